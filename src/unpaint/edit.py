"""Edit: what a method changed in which weights of a pipeline; saved, applied, scaled, added up and taken back.

    Edit.load("edit.safetensors").apply(pipe)

Edits made from the same base add up: the weights are base + sum of scale * delta over the applied edits, in the order
of their ids, computed in float32 (or wider, if the weights are) and cast to the weight's dtype; positions that any
applied edit zeroes are then 0. The base tensors are kept aside when an edit first touches them and put back when the
last one is removed, so `apply` then `remove` gives the same bits.

`apply` defines what the edited weights are. W + (W' - W) can differ from the trained W' in the last bits, and in a
pipeline loaded in lower precision than the edit was made in, the sum is rounded once more.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from unpaint import __version__, edit_header
from unpaint.errors import UserError, nearest
from unpaint.files import replacing

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Header:
    """What an edit was made for and by.

    base: `{"architecture": {component: "class hash"}, "hash": sha256 of the base weights that the edit changes}`.
    config: the resolved model, concept, method and seed; no paths, no time.
    version: of the unpaint that made it.
    """

    format: int
    base: dict[str, Any]
    method: str
    concept: str
    config: dict[str, Any]
    version: str


@dataclass
class _Applied:
    """What stands on one component: its base tensors by key, and the applied edits with their scales by id."""

    originals: dict[str, Tensor] = field(default_factory=dict)
    edits: dict[str, tuple[Edit, float]] = field(default_factory=dict)


_APPLIED: WeakKeyDictionary[nn.Module, _Applied] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of a pipeline's weights. Keys are component and diffusers name, `unet.down_blocks.0…weight`.

    delta: float32 on the CPU, each shaped as its weight, added to it.
    zero: bool on the CPU, likewise; weights where True become 0.
    An edit is not to be changed once made: its id is the hash of its content.
    """

    header: Header
    delta: dict[str, Tensor]
    zero: dict[str, Tensor]

    # ------------------------------------------------------------ making

    @classmethod
    def from_change(
        cls,
        pipe: DiffusionPipeline,
        before: Mapping[str, Tensor],
        *,
        method: str,
        concept: str,
        config: Mapping[str, Any],
    ) -> Edit:
        """The edit that leads from the tensors `before`, by key, to what `pipe` now holds under the same keys.

        Weights that did not change are left out. Raises UserError if an edit is applied to `pipe`, if a key or a
        shape is not the pipeline's, or if the weights hold NaN or infinity.
        """
        before = _matched(pipe, before)
        now = _weights(pipe, _components(pipe, before))
        delta = {}
        for key, old in before.items():
            new = now[key].detach()
            change = (new.float() - old.detach().to(new.device).float()).cpu()
            if not bool(torch.isfinite(change).all()):
                raise UserError(f"{key} holds NaN or infinity after {method}: no edit is made of it")
            if bool(change.any()):
                delta[key] = change.contiguous()
        base = _base(pipe, _components(pipe, before), {key: before[key] for key in delta})
        return cls(_new_header(base, method, concept, config), delta, {})

    @classmethod
    def from_zeros(
        cls,
        pipe: DiffusionPipeline,
        masks: Mapping[str, Tensor],
        *,
        method: str,
        concept: str,
        config: Mapping[str, Any],
    ) -> Edit:
        """The edit that sets the weights of the unedited `pipe` to zero where a mask (bool, the weight's shape) is
        True. Raises UserError if an edit is applied to `pipe` or a key or a shape is not the pipeline's."""
        masks = _matched(pipe, masks)
        masks = {key: mask.detach().to("cpu", torch.bool) for key, mask in masks.items()}
        zero = {key: mask.contiguous() for key, mask in masks.items() if bool(mask.any())}
        weights = _weights(pipe, _components(pipe, masks))
        base = _base(pipe, _components(pipe, masks), {key: weights[key] for key in zero})
        return cls(_new_header(base, method, concept, config), {}, zero)

    @classmethod
    def total(
        cls, pipe: DiffusionPipeline, edits: Sequence[Edit], *, method: str, concept: str, config: Mapping[str, Any]
    ) -> Edit:
        """One edit that does to the unedited `pipe` what all of `edits` do together, to the bit.

        Raises UserError if an edit is applied to `pipe`, or one of `edits` does not fit it.
        """
        _matched(pipe, {})
        for edit in edits:
            edit._check_fits(pipe)
        edits = sorted(edits, key=lambda edit: edit.id)
        delta: dict[str, Tensor] = {}
        zero: dict[str, Tensor] = {}
        for edit in edits:
            for key, values in edit.delta.items():
                delta[key] = delta[key] + values if key in delta else torch.zeros_like(values) + values
            for key, mask in edit.zero.items():
                zero[key] = zero[key] | mask if key in zero else mask
        weights = _weights(pipe, _components(pipe, delta | zero))
        base = _base(pipe, _components(pipe, delta | zero), {key: weights[key] for key in delta.keys() | zero.keys()})
        return cls(_new_header(base, method, concept, config), dict(sorted(delta.items())), dict(sorted(zero.items())))

    # ------------------------------------------------------------ the file

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read an edit file. Raises UserError, in one line, for whatever is wrong with it: see `edit_header.read`."""
        header, tensors = edit_header.read(path)
        delta, zero = edit_header.decode(header, tensors)
        return cls(
            Header(**{entry.name: header[entry.name] for entry in fields(Header)}),
            {key: torch.from_numpy(values) for key, values in sorted(delta.items())},
            {key: torch.from_numpy(mask) for key, mask in sorted(zero.items())},
        )

    def save(self, path: str | Path) -> None:
        """Write the edit as one safetensors file, whole or not at all. The same edit is always the same bytes."""
        with replacing(Path(path), sync=True) as beside:
            beside.write_bytes(self._bytes())

    def _encoded(self) -> dict[str, edit_header.Stored]:
        return edit_header.encode(
            {key: values.numpy() for key, values in self.delta.items()},
            {key: mask.numpy() for key, mask in self.zero.items()},
        )

    @cached_property
    def _file_header(self) -> dict[str, Any]:
        shapes = {key: list(values.shape) for key, values in {**self.delta, **self.zero}.items()}
        return edit_header.seal(asdict(self.header), shapes, self._encoded())

    def _bytes(self) -> bytes:
        return edit_header.to_bytes(self._file_header, self._encoded())

    @property
    def id(self) -> str:
        """12 hexadecimal digits of a sha256 over header and tensors: equal for equal edits."""
        return self._file_header["sha256"][: edit_header.ID_LENGTH]

    @cached_property
    def nbytes(self) -> int:
        """Size of the saved file in bytes."""
        return len(self._bytes())

    @property
    def changed_parameters(self) -> int:
        """Number of single weights that the edit changes or sets to zero."""
        count = sum(int(values.count_nonzero()) for values in self.delta.values())
        for key, mask in self.zero.items():
            count += int((mask & (self.delta[key] == 0)).sum()) if key in self.delta else int(mask.sum())
        return count

    # ------------------------------------------------------------ on a pipeline

    def apply(self, pipe: DiffusionPipeline, scale: float = 1.0) -> DiffusionPipeline:
        """Add the edit, `scale` times, to what is applied to `pipe`, in place; applied already, set its scale.

        Edits that zero weights take scale 0 or 1 only. Raises UserError, the pipeline untouched, if the pipeline is
        not the base that the edit was made for, a tensor has another shape or holds NaN or infinity, or the scale is
        not finite or lets a weight overflow.
        """
        if not math.isfinite(scale):
            raise UserError(f"the scale of an edit must be finite, not {scale}")
        if self.zero and scale not in (0, 1):
            raise UserError(f"the edit {self.id} sets weights to zero: its scale is 0 or 1, not {scale:g}")
        self._check_fits(pipe)
        self._write(pipe, float(scale))
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Take the edit off `pipe`, in place; others stay. Raises UserError if it is not applied."""
        modules = [_module(pipe, component) for component in self._components]
        if any(module is None or self.id not in _applied_to(module).edits for module in modules):
            there = ", ".join(id for id, _ in applied(pipe)) or "none"
            raise UserError(f"the edit {self.id} is not applied to this pipeline; applied: {there}")
        self._write(pipe, None)
        return pipe

    def export(self, pipe: DiffusionPipeline, folder: str | Path) -> None:
        """Write `pipe` with this edit as a diffusers folder that needs no unpaint, and leave `pipe` as it was.

        What else is applied to `pipe` is written as well; the edit itself counts once, or with the scale at which it
        is applied already. Raises UserError if `folder` holds something, or as `apply` does.
        """
        target = Path(folder)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} exists and is not empty: expected a new folder to export to")
        is_new = self.id not in dict(applied(pipe))
        if is_new:
            self.apply(pipe)
        beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            beside.mkdir(parents=True)
            pipe.save_pretrained(beside)
            os.replace(beside, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            if is_new:
                self.remove(pipe)

    @property
    def _components(self) -> list[str]:
        return sorted(self.header.base["architecture"])

    def _check_fits(self, pipe: DiffusionPipeline) -> None:
        header, where = asdict(self.header), f"this {type(pipe).__name__}"
        for component in self._components:
            module = _module(pipe, component)
            found = None if module is None else _architecture(component, module)
            if found != self.header.base["architecture"][component]:
                raise UserError(edit_header.architecture_mismatch(header, component, found, where))
        weights = _weights(pipe, self._components)
        for key, values in [*self.delta.items(), *self.zero.items()]:
            if key not in weights:
                raise UserError(f"the edit {self.id} changes {key}, which this pipeline has not{nearest(key, weights)}")
            if values.shape != weights[key].shape:
                shapes = f"{tuple(values.shape)}, the pipeline's weight {tuple(weights[key].shape)}"
                raise UserError(f"the edit {self.id} has {key} of shape {shapes}")
        for key, values in self.delta.items():
            if not bool(torch.isfinite(values).all()):
                raise UserError(f"the edit {self.id} holds NaN or infinity in {key}")
        keys = self.delta.keys() | self.zero.keys()
        found = _hash({key: _original(pipe, key, weights[key]) for key in keys})
        if found != self.header.base["hash"]:
            message = edit_header.hash_mismatch(header, found, where)
            if any(weights[key].dtype == torch.bfloat16 for key in keys):
                message += "; it is loaded in bfloat16, which rounds them: load it in float16 or float32"
            raise UserError(message)

    def _write(self, pipe: DiffusionPipeline, scale: float | None) -> None:
        """Set this edit's scale (None: take it off) and rewrite its weights from the base tensors."""
        weights = _weights(pipe, self._components)
        new = {}
        for key in sorted(self.delta.keys() | self.zero.keys()):
            edits = dict(_applied_to(_module_of(pipe, key)).edits)
            edits.pop(self.id, None)
            if scale is not None:
                edits[self.id] = (self, scale)
            original = _original(pipe, key, weights[key])
            new[key] = _edited(key, original, edits).to(weights[key].dtype)
            if scale is not None and not bool(torch.isfinite(new[key]).all()):
                raise UserError(f"the edit {self.id} at scale {scale:g} makes {key} overflow {weights[key].dtype}")
        # Nothing was written until here.
        with torch.no_grad():
            for key, values in new.items():
                state = _APPLIED.setdefault(_module_of(pipe, key), _Applied())
                if key not in state.originals:
                    state.originals[key] = weights[key].detach().clone()
                weights[key].copy_(values)
        for component in self._components:
            module = _module_of(pipe, component)
            state = _APPLIED.setdefault(module, _Applied())
            if scale is not None:
                state.edits[self.id] = (self, scale)
            else:
                state.edits.pop(self.id)
            needed = {key for edit, _ in state.edits.values() for key in edit.delta.keys() | edit.zero.keys()}
            state.originals = {key: kept for key, kept in state.originals.items() if key in needed}
            if not state.edits:
                del _APPLIED[module]


def applied(pipe: DiffusionPipeline) -> list[tuple[str, float]]:
    """(edit id, scale) of the edits that are applied to a pipeline, sorted by id."""
    modules = [module for value in vars(pipe).values() if (module := _uncompiled(value)) is not None]
    return sorted({(id, scale) for module in modules for id, (_, scale) in _applied_to(module).edits.items()})


def text_edits(pipe: DiffusionPipeline) -> tuple[tuple[str, float], ...]:
    """Those of `applied` that were made for the text encoder: texts encoded under others are other ones."""
    module = _module(pipe, "text_encoder")
    return () if module is None else tuple(sorted((id, scale) for id, (_, scale) in _applied_to(module).edits.items()))


def _edited(key: str, original: Tensor, edits: Mapping[str, tuple[Edit, float]]) -> Tensor:
    """A base tensor with edits upon it, in float32 or wider; untouched positions keep their bits, -0.0 too."""
    active = [(edit, scale) for _, (edit, scale) in sorted(edits.items()) if scale != 0]
    wide = original.to(torch.promote_types(original.dtype, torch.float32))
    deltas = [(edit.delta[key], scale) for edit, scale in active if key in edit.delta]
    if deltas:
        total = torch.zeros_like(wide)
        for delta, scale in deltas:
            total += scale * delta.to(wide.device)
        wide = torch.where(total == 0, wide, wide + total)
    for edit, _ in active:
        if key in edit.zero:
            wide = wide.masked_fill(edit.zero[key].to(wide.device), 0)
    return wide


# ---------------------------------------------------------------- components and their weights


def _uncompiled(module: object) -> nn.Module | None:
    """A component as a module, without torch.compile's wrapper around it; None if it is no module."""
    module = getattr(module, "_orig_mod", module)
    return module if isinstance(module, nn.Module) else None


def _module(pipe: DiffusionPipeline, component: str) -> nn.Module | None:
    return _uncompiled(getattr(pipe, component, None))


def _module_of(pipe: DiffusionPipeline, key: str) -> nn.Module:
    component = key.partition(".")[0]
    module = _module(pipe, component)
    if module is None:
        there = sorted(name for name, value in vars(pipe).items() if _uncompiled(value) is not None)
        raise UserError(f"this {type(pipe).__name__} has no {component}; it has {', '.join(there)}")
    return module


def _components(pipe: DiffusionPipeline, keys: Mapping[str, object]) -> list[str]:
    """The components that keys belong to; the denoiser if there are no keys, so that an empty edit has a base too."""
    return sorted({key.partition(".")[0] for key in keys}) or [
        next((name for name in ("unet", "transformer") if _module(pipe, name) is not None), "unet")
    ]


def _named(component: str, module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict(keep_vars=True)
    return {edit_header.canonical_key(f"{component}.{n}"): w for n, w in state.items() if isinstance(w, Tensor)}


def _weights(pipe: DiffusionPipeline, components: list[str]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for component in components:
        weights |= _named(component, _module_of(pipe, component))
        if any(weight.is_meta for weight in weights.values()):
            raise UserError(f"the weights of {component} are offloaded: expected a pipeline with its weights in memory")
    return weights


def _matched(pipe: DiffusionPipeline, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under canonical keys in sorted order, each known to the pipeline, of its shape and not edited."""
    if here := applied(pipe):
        raise UserError(f"an edit is made of the unedited pipeline: remove {', '.join(id for id, _ in here)} first")
    result = {edit_header.canonical_key(key): tensor for key, tensor in sorted(tensors.items())}
    weights = _weights(pipe, _components(pipe, result))
    for key, tensor in result.items():
        if key not in weights:
            raise UserError(f"the pipeline has no weight {key}{nearest(key, weights)}")
        if tensor.shape != weights[key].shape:
            raise UserError(f"{key} has shape {tuple(weights[key].shape)}, not {tuple(tensor.shape)}")
    return dict(sorted(result.items()))


def _applied_to(module: nn.Module) -> _Applied:
    return _APPLIED.get(module) or _Applied()


def _original(pipe: DiffusionPipeline, key: str, weight: Tensor) -> Tensor:
    """The base tensor of a weight: the one kept aside, moved to where the weight is now, or the weight itself."""
    return _applied_to(_module_of(pipe, key)).originals.get(key, weight.detach()).to(weight.device)


# ---------------------------------------------------------------- the header


def _architecture(component: str, module: nn.Module) -> str:
    shapes = {key: weight.shape for key, weight in _named(component, module).items()}
    return edit_header.architecture(type(module).__name__, shapes)


def _hash(weights: Mapping[str, Tensor]) -> str:
    return edit_header.base_hash((k, weights[k].detach().to(torch.float16).cpu().numpy()) for k in sorted(weights))


def _base(pipe: DiffusionPipeline, components: list[str], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    architectures = {component: _architecture(component, _module_of(pipe, component)) for component in components}
    return {"architecture": architectures, "hash": _hash(weights)}


def _new_header(base: dict[str, Any], method: str, concept: str, config: Mapping[str, Any]) -> Header:
    # Through JSON and back: a made and a loaded edit have the same config, lists and not tuples.
    plain = json.loads(edit_header.canonical_json(config))
    return Header(edit_header.FORMAT, base, method, concept, plain, __version__)
