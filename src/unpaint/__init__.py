"""unpaint removes concepts from text-to-image diffusion models and measures what was removed and what it cost."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unpaint.edit import Edit

__version__ = "0.1.0"
__all__ = ["Edit", "__version__"]


def __getattr__(name: str) -> Any:
    # Edit needs torch; `import unpaint` and `unpaint --help` must not wait for it.
    if name == "Edit":
        from unpaint.edit import Edit

        return Edit
    raise AttributeError(f"module 'unpaint' has no attribute {name!r}")
