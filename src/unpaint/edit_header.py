"""The file of an edit, read and written without torch: layout, checksums, and what the edit was made for.

An edit is one safetensors file. `<key>` is a weight's name with its component in front, `unet.down_blocks.0…weight`.
Every key is stored in whichever form takes the fewest bytes:

| tensors                      | dtype                    | shape          | meaning                               |
| ---------------------------- | ------------------------ | -------------- | ------------------------------------- |
| `<key>`                      | F32, F16 or BF16         | the weight's   | dense delta                           |
| `<key>:index`, `<key>:value` | I32 and F32, F16 or BF16 | (k,) each      | delta at k rising flat positions      |
| `<key>:zero_index`           | I32                      | (k,)           | k rising flat positions set to zero   |
| `<key>:zero_bits`            | U8                       | (ceil(n / 8),) | a bit for each of n flat positions    |

Flat positions count in C order. F16 and BF16 hold a delta only where every value survives the cast exactly. Bits are in
the order of numpy's `packbits`: the first position is the highest bit of the first byte, the last byte is filled up
with 0, and 1 means set to zero.

The metadata entry `unpaint` is canonical JSON (sorted keys, no spaces):
`format` (1), `base` {`architecture`: {component: "class hash"}, `hash`}, `method`, `concept`, `config`, `version`,
`shapes` {key: the weight's shape}, `payload_sha256` over the tensors' names, dtypes, shapes and bytes, and `sha256`
over all the entries before it, whose first 12 digits are the edit's id.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unpaint.errors import UserError

FORMAT = 1
ID_LENGTH = 12
METADATA_KEY = "unpaint"
MAX_JSON_BYTES = 100_000_000  # safetensors' own limit on a file's JSON
_FIELDS = {
    "base": dict,
    "method": str,
    "concept": str,
    "config": dict,
    "version": str,
    "shapes": dict,
    "payload_sha256": str,
    "sha256": str,
}
_NUMPY_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I32": np.int32, "U8": np.uint8}
_VALUE_DTYPES = ("F32", "F16", "BF16")


class Stored(NamedTuple):
    """One tensor as it lies in a safetensors file: safetensors' dtype name, shape, and the raw bytes (uint8, flat)."""

    dtype: str
    shape: list[int]
    raw: NDArray[np.uint8]

    def numbers(self) -> NDArray[Any]:
        """A flat copy: float32 for the floating dtypes, int32 or uint8 for the others."""
        flat = self.raw.copy().view(_NUMPY_DTYPES[self.dtype])
        if self.dtype == "BF16":
            return (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.astype(np.float32) if self.dtype == "F16" else flat


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces. Raises ValueError on NaN or infinity, TypeError on what JSON cannot hold."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _sha256(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


# ---------------------------------------------------------------- what an edit was made for


def canonical_key(key: str) -> str:
    """The name under which an edit knows a weight: transformers' CLIP text towers are named with or without a
    `text_model.` in front, by version and by class, and an edit fits both."""
    component, _, name = key.partition(".")
    return f"{component}.{name.removeprefix('text_model.')}" if component.startswith("text_encoder") else key


def architecture(class_name: str, shapes: Mapping[str, Sequence[int]]) -> str:
    """`"UNet2DConditionModel 1a2b3c4d5e6f"`: a component's class and a hash of its (canonical key, shape) pairs."""
    return f"{class_name} {_sha256({key: list(shape) for key, shape in shapes.items()})[:12]}"


def base_hash(weights: Iterable[tuple[str, NDArray[np.float16]]]) -> str:
    """Hash of the weights that an edit changes, cast to float16 so that one base loaded as float32 or as float16 is
    the same base. `weights` must come in sorted order of their keys."""
    digest = hashlib.sha256()
    for key, weight in weights:
        digest.update(canonical_json([key, list(weight.shape)]).encode())
        digest.update(np.ascontiguousarray(weight).view(np.uint8).data)
    return digest.hexdigest()


def title(header: Mapping[str, Any]) -> str:
    """`the edit esd of cat for picturebook`, for messages."""
    model = header["config"].get("model")
    name = model.get("name") if isinstance(model, dict) else model
    return f"the edit {header['method']} of {header['concept']}" + (f" for {name}" if isinstance(name, str) else "")


def architecture_mismatch(header: Mapping[str, Any], component: str, found: str | None, where: str) -> str:
    """The line that says what architecture an edit was made for and what stands there; None: no such component."""
    stands = f"has {found}" if found else f"has no {component}"
    return f"{title(header)} was made for {component} {header['base']['architecture'][component]}; {where} {stands}"


def hash_mismatch(header: Mapping[str, Any], found: str, where: str) -> str:
    """The line that says which base weights an edit was made for and which stand there."""
    made_for = header["base"]["hash"]
    return f"{title(header)} was made for base weights {made_for[:12]}; {where} has {found[:12]} in their place"


# ---------------------------------------------------------------- writing


def _narrowest(values: NDArray[np.float32]) -> tuple[str, NDArray[Any]]:
    """Float32 values as float16 or bfloat16 bits if each survives exactly, else as they are."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if np.array_equal(half.astype(np.float32), values):
        return "F16", half
    bits = values.view(np.uint32)
    if not (bits & 0xFFFF).any():
        return "BF16", (bits >> 16).astype(np.uint16)
    return "F32", values


def _stored(dtype: str, values: NDArray[Any], shape: Sequence[int] | None = None) -> Stored:
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return Stored(dtype, list(values.shape if shape is None else shape), raw)


def encode(delta: Mapping[str, NDArray[np.float32]], zero: Mapping[str, NDArray[np.bool_]]) -> dict[str, Stored]:
    """Deltas (float32, shaped as the weights) and zeroed positions (bool, likewise) in their smallest stored form."""
    tensors: dict[str, Stored] = {}
    for key, dense in delta.items():
        flat = dense.reshape(-1) + np.float32(0)  # -0.0 becomes 0.0: a dense and a sparse delta hold the same numbers
        dtype, values = _narrowest(flat)
        index = np.flatnonzero(flat)
        if flat.size < 2**31 and index.size * (4 + values.itemsize) < flat.size * values.itemsize:
            tensors[f"{key}:index"] = _stored("I32", index.astype(np.int32))
            tensors[f"{key}:value"] = _stored(dtype, values[index])
        else:
            tensors[key] = _stored(dtype, values, dense.shape)
    for key, mask in zero.items():
        index, bits = np.flatnonzero(mask), np.packbits(mask.reshape(-1))
        if mask.size < 2**31 and index.size * 4 < bits.size:
            tensors[f"{key}:zero_index"] = _stored("I32", index.astype(np.int32))
        else:
            tensors[f"{key}:zero_bits"] = _stored("U8", bits)
    return tensors


def _payload_sha256(tensors: Mapping[str, Stored]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        dtype, shape, raw = tensors[name]
        digest.update(canonical_json([name, dtype, shape]).encode())
        digest.update(raw.data)
    return digest.hexdigest()


def seal(fields: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], tensors: Mapping[str, Stored]) -> dict:
    """The file's header: `fields` (format to version) with the shapes and both checksums added."""
    header = dict(fields, shapes={key: list(shape) for key, shape in shapes.items()})
    header["payload_sha256"] = _payload_sha256(tensors)
    return dict(header, sha256=_sha256(header))


def to_bytes(header: Mapping[str, Any], tensors: Mapping[str, Stored]) -> bytes:
    """The whole file. Written here and not by safetensors, so that its bytes do not hang on that library's version."""
    layout: dict[str, Any] = {"__metadata__": {METADATA_KEY: canonical_json(header)}}
    # Widest numbers first keeps every tensor aligned.
    order = sorted(tensors, key=lambda name: (-np.dtype(_NUMPY_DTYPES[tensors[name].dtype]).itemsize, name))
    end = 0
    for name in order:
        dtype, shape, raw = tensors[name]
        layout[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + raw.size]}
        end += raw.size
    text = json.dumps(layout, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(tensors[name].raw.data for name in order)])


# ---------------------------------------------------------------- reading


def _json_of(text: bytes | str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _layout(raw: NDArray[np.uint8], file: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """A safetensors file's metadata and tensors (views of `raw`); UserError if it is none or not all of it is there."""
    if raw.size == 0:
        raise UserError(f"{file} is empty: expected a safetensors file")
    length = int.from_bytes(raw[:8].tobytes(), "little") if raw.size >= 8 else 0
    if raw.size < 8 or length > MAX_JSON_BYTES:
        raise UserError(f"{file} is not a safetensors file")
    start = 8 + length
    if start > raw.size:
        raise UserError(f"{file} is truncated, or not a safetensors file: it has {raw.size} bytes of at least {start}")
    text = raw[8:start].tobytes()
    layout = _json_of(text)
    if not text.rstrip(b" ").endswith(b"}") or not isinstance(layout, dict):
        raise UserError(f"{file} is not a safetensors file: its layout cannot be read")
    metadata = layout.pop("__metadata__", {})
    tensors: dict[str, Stored] = {}
    try:
        spans = sorted((*map(int, entry["data_offsets"]), name) for name, entry in layout.items())
        expected = 0
        for begin, end, name in spans:
            dtype, shape = layout[name]["dtype"], [int(n) for n in layout[name]["shape"]]
            width = np.dtype(_NUMPY_DTYPES[dtype]).itemsize if dtype in _NUMPY_DTYPES else None
            sound = min(shape, default=0) >= 0 and begin == expected <= end
            if not sound or (width is not None and end - begin != width * math.prod(shape)):
                raise UserError(f"{file} was altered or damaged: the place of {name} does not fit its shape")
            tensors[name] = Stored(dtype, shape, raw[start + begin : start + end])
            expected = end
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{file} was altered or damaged: its layout cannot be read") from error
    if start + expected > raw.size:
        raise UserError(f"{file} is truncated: it has {raw.size} bytes of {start + expected}")
    if start + expected < raw.size:
        raise UserError(f"{file} was altered or damaged: it has {raw.size - start - expected} bytes too many")
    return metadata if isinstance(metadata, dict) else {}, tensors


def _header(metadata: dict[str, Any], file: Path) -> dict[str, Any]:
    """The header in a file's metadata, its own checksum verified."""
    text = metadata.get(METADATA_KEY)
    if not isinstance(text, str):
        raise UserError(f"{file} is not an edit of unpaint: its metadata has no `{METADATA_KEY}` header")
    header = _json_of(text)
    if not isinstance(header, dict) or type(header.get("format")) is not int:
        raise UserError(f"{file} was altered or damaged: its header cannot be read")
    if header["format"] != FORMAT:
        raise UserError(f"{file} has edit format {header['format']}; this unpaint reads format {FORMAT} only")
    if any(not isinstance(header.get(field), kind) for field, kind in _FIELDS.items()):
        missing = next(field for field, kind in _FIELDS.items() if not isinstance(header.get(field), kind))
        raise UserError(f"{file} was altered or damaged: its header has no proper `{missing}`")
    unsealed = {field: value for field, value in header.items() if field != "sha256"}
    try:
        # Comparing the text as well refuses another spelling of the same JSON, an escaped letter for instance.
        intact = header["sha256"] == _sha256(unsealed) and canonical_json(header) == text
    except ValueError:  # NaN or infinity
        intact = False
    if not intact:
        raise UserError(f"{file} was altered or damaged: its header does not match its checksum")
    base = header["base"]
    if not isinstance(base.get("architecture"), dict) or not isinstance(base.get("hash"), str):
        raise UserError(f"{file} was altered or damaged: its header has no proper `base`")
    return header


def _check_positions(stored: Stored, size: int) -> bool:
    """Positions rise, and lie between 0 and size."""
    if stored.dtype != "I32":
        return False
    index = stored.numbers().astype(np.int64)
    return index.size == 0 or bool(index[0] >= 0 and index[-1] < size and (np.diff(index) > 0).all())


def _check_tensors(header: dict[str, Any], tensors: Mapping[str, Stored], file: Path) -> None:
    """Every stored tensor belongs to a key of `shapes`, fits it and is finite; every key has a tensor."""
    seen = set()
    for name, stored in tensors.items():
        key, _, form = name.partition(":")
        seen.add(key)
        shape = header["shapes"].get(key)
        if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
            raise UserError(f"{file} was altered or damaged: its header gives no shape for {key}")
        if key.partition(".")[0] not in header["base"]["architecture"]:
            raise UserError(f"{file} was altered or damaged: its header names no component for {key}")
        size = math.prod(shape)
        partner = tensors.get({"index": f"{key}:value", "value": f"{key}:index"}.get(form, name))
        fits = partner is not None and {
            "": stored.dtype in _VALUE_DTYPES and stored.shape == shape,
            "index": stored.shape == partner.shape and len(stored.shape) == 1,
            "value": stored.dtype in _VALUE_DTYPES and f"{key}" not in tensors,
            "zero_index": len(stored.shape) == 1 and f"{key}:zero_bits" not in tensors,
            "zero_bits": stored.dtype == "U8" and stored.shape == [-(-size // 8)],
        }.get(form, False)
        if fits and form in ("index", "zero_index"):
            fits = _check_positions(stored, size)
        if fits and form == "zero_bits":
            fits = not np.unpackbits(stored.raw)[size:].any()
        if not fits:
            raise UserError(f"{file}: {name} does not fit the shape {shape} of its weight")
        if stored.dtype in _VALUE_DTYPES and not np.isfinite(stored.numbers()).all():
            raise UserError(f"{file}: {name} holds NaN or infinity")
    if seen != set(header["shapes"]):
        raise UserError(f"{file} was altered or damaged: it holds nothing for {min(set(header['shapes']) - seen)}")


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """An edit file's header and stored tensors, after every check that needs no pipeline.

    Raises UserError, in one line: no such file, not safetensors, truncated, altered, without header, of an unknown
    format, a tensor that does not fit its weight's shape, NaN or infinity.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no edit file {file}")
    metadata, tensors = _layout(np.fromfile(file, np.uint8), file)
    header = _header(metadata, file)
    if header["payload_sha256"] != _payload_sha256(tensors):
        raise UserError(f"{file} was altered or damaged: its tensors do not match their checksum")
    _check_tensors(header, tensors, file)
    return header, tensors


def read_header(path: str | Path) -> dict[str, Any]:
    """An edit file's header (see the top of this module), after the same checks of the whole file as `read`."""
    return read(path)[0]


def decode(
    header: Mapping[str, Any], tensors: Mapping[str, Stored]
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.bool_]]]:
    """What `encode` stored: dense float32 deltas and bool masks, shaped as the weights."""
    delta: dict[str, NDArray[np.float32]] = {}
    zero: dict[str, NDArray[np.bool_]] = {}
    for name, stored in tensors.items():
        key, _, form = name.partition(":")
        shape = header["shapes"][key]
        size = math.prod(shape)
        if form == "":
            delta[key] = stored.numbers().reshape(shape)
        elif form == "index":
            flat = np.zeros(size, np.float32)
            flat[stored.numbers()] = tensors[f"{key}:value"].numbers()
            delta[key] = flat.reshape(shape)
        elif form == "zero_index":
            mask = np.zeros(size, np.bool_)
            mask[stored.numbers()] = True
            zero[key] = mask.reshape(shape)
        elif form == "zero_bits":
            zero[key] = np.unpackbits(stored.raw, count=size).astype(np.bool_).reshape(shape)
    return delta, zero


# ---------------------------------------------------------------- does it fit a model's folder?


def _weights_file(folder: Path) -> Path | None:
    """The one safetensors file that a component's folder is loaded from; None if there is none or it is in shards."""
    if any(folder.glob("*.safetensors.index*.json")):
        return None
    for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        if (folder / name).is_file():
            return folder / name
    variants = sorted(folder.glob("diffusion_pytorch_model.*.safetensors")) + sorted(folder.glob("model.*.safetensors"))
    return variants[0] if len(variants) == 1 else None


def _json_file(file: Path) -> dict[str, Any] | None:
    try:
        content = _json_of(file.read_bytes())
    except OSError:
        return None
    return content if isinstance(content, dict) else None


def _component_weights(folder: Path, component: str) -> dict[str, Stored] | None:
    file = _weights_file(folder / component)
    if file is None:
        return None
    try:
        _, tensors = _layout(np.memmap(file, np.uint8, mode="r"), file)
    except (OSError, ValueError, UserError):  # whoever loads the model will say what is wrong with it
        return None
    # Old transformers saved the position ids, which are no weights.
    return {canonical_key(f"{component}.{n}"): t for n, t in tensors.items() if not n.endswith("position_ids")}


def _half(stored: Stored, bfloat16: bool) -> NDArray[np.float16]:
    """A weight in float16, shaped; `bfloat16`: rounded to bfloat16 before (to nearest, ties to even)."""
    values = stored.numbers()
    if bfloat16:
        bits = values.view(np.uint32)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    with np.errstate(over="ignore"):
        return values.astype(np.float16).reshape(stored.shape)


def base_mismatch(header: Mapping[str, Any], pipeline_folder: Path) -> str | None:
    """Why an edit does not fit the diffusers pipeline in a folder, in one line, judged from its files without torch.

    None when it fits, and when the files cannot tell: no safetensors, shards, a text encoder other than CLIP's, or
    weights that are neither float32, float16 nor bfloat16. `Edit.apply` asks again, of the pipeline in memory.
    """
    folder = Path(pipeline_folder)
    where = f"the model in {folder}"
    index = _json_file(folder / "model_index.json")
    if index is None:
        return None
    weights: dict[str, Stored] = {}
    for component, made_for in header["base"]["architecture"].items():
        match index.get(component):
            case [str(library), str(class_name)]:
                pass
            case _:
                return architecture_mismatch(header, component, None, where)
        # Other transformers models tie weights, which the file then holds once and the model twice.
        if library == "transformers" and not class_name.startswith("CLIPText"):
            return None
        found = _component_weights(folder, component)
        if found is None:
            return None
        stands = architecture(class_name, {key: stored.shape for key, stored in found.items()})
        if stands != made_for:
            return architecture_mismatch(header, component, stands, where)
        weights |= found
    changed = {key: weights[key] for key in sorted(header["shapes"]) if key in weights}
    if any(stored.dtype not in _VALUE_DTYPES for stored in changed.values()):
        return None
    stands = base_hash((key, _half(stored, bfloat16=False)) for key, stored in changed.items())
    # An edit made on the model loaded in bfloat16 carries the hash of its rounded weights.
    rounded = ((key, _half(stored, bfloat16=True)) for key, stored in changed.items())
    if header["base"]["hash"] == stands or header["base"]["hash"] == base_hash(rounded):
        return None
    return hash_mismatch(header, stands, where)
