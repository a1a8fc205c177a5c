"""One seed a picture, for each purpose its own. Pure arithmetic: imports no torch."""

import hashlib

from unpaint.errors import nearest

NAMESPACES = ("bank", "fresh", "tune", "score", "probe", "attack")


def seed_of(namespace: str, seed: int, *index: int) -> int:
    """A seed below 2**32, the same on every machine, for one picture of one purpose.

    The lowest three bits tell the namespace, so that no two namespaces ever share a latent, whatever the rest hashes
    to. (A CPU generator of PyTorch uses 32 bits of its seed.) Raises ValueError on an unknown namespace.
    """
    if namespace not in NAMESPACES:
        raise ValueError(
            f"unknown seed namespace {namespace!r}, there are {NAMESPACES}{nearest(namespace, NAMESPACES)}"
        )
    digest = hashlib.sha256("/".join(map(str, (namespace, seed, *index))).encode()).digest()
    return (int.from_bytes(digest[:4], "big") & ~7) | NAMESPACES.index(namespace)
