from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unpaint import edit as edit_module
from unpaint import edit_header
from unpaint.edit import Edit, applied
from unpaint.edit_header import Stored, base_mismatch, read_header
from unpaint.errors import UserError

CONFIG = {"model": {"name": "tiny"}, "concept": {"name": "cat"}, "seed": 0}
KEY = "unet.conv_in.weight"
KEY_2 = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
TEXT_KEY = "text_encoder.embeddings.token_embedding.weight"


def parameter(pipe: Any, key: str) -> Tensor:
    component, _, name = key.partition(".")
    return getattr(pipe, component).state_dict(keep_vars=True)[name]


def bits(pipe: Any) -> dict[str, Tensor]:
    """Every weight's bytes: equal only if bit for bit equal, NaN and -0.0 included."""
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "vae": pipe.vae}
    state = {f"{name}.{key}": w for name, part in parts.items() for key, w in part.state_dict().items()}
    return {key: w.detach().clone().contiguous().reshape(-1).view(torch.uint8) for key, w in state.items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def random_change(pipe: Any, seed: int, keys: tuple[str, ...] = (KEY, KEY_2), share: float = 1.0) -> Edit:
    """An edit that moves a share of the weights of `keys` at random; the pipeline is as before afterwards."""
    generator = torch.Generator().manual_seed(seed)
    before = {key: parameter(pipe, key).detach().clone() for key in keys}
    with torch.no_grad():
        for key in keys:
            weight = parameter(pipe, key)
            chosen = torch.rand(weight.shape, generator=generator) < share
            weight += (torch.randn(weight.shape, generator=generator) * 0.1 * chosen).to(weight.dtype)
    edit = Edit.from_change(pipe, before, method="esd", concept="cat", config=CONFIG)
    with torch.no_grad():
        for key in keys:
            parameter(pipe, key).copy_(before[key])
    return edit


def zeros(pipe: Any, *positions: int, key: str = KEY) -> Edit:
    mask = torch.zeros(parameter(pipe, key).shape, dtype=torch.bool)
    mask.view(-1)[list(positions)] = True
    return Edit.from_zeros(pipe, {key: mask}, method="concept_prune", concept="cat", config=CONFIG)


def load_pipe(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=dtype)


def rounded_to_half(pipe: Any) -> Any:
    """The pipeline with every weight rounded to a float16 number, still in float32."""
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.to(torch.float16).to(torch.float32)
    return pipe


# ------------------------------------------------------------ making


def test_from_change_keeps_only_what_changed(tiny_pipe: Any) -> None:
    before = {key: parameter(tiny_pipe, key).detach().clone() for key in (KEY, KEY_2, TEXT_KEY)}
    with torch.no_grad():
        parameter(tiny_pipe, KEY).view(-1)[3] += 0.5
        parameter(tiny_pipe, TEXT_KEY)[7] *= 2
    edit = Edit.from_change(tiny_pipe, before, method="esd", concept="cat", config=CONFIG)
    assert list(edit.delta) == [TEXT_KEY, KEY]
    assert edit.changed_parameters == 1 + before[TEXT_KEY].shape[1]
    assert edit.delta[KEY].dtype == torch.float32
    assert sorted(edit.header.base["architecture"]) == ["text_encoder", "unet"]
    assert edit.header.base["architecture"]["unet"].startswith("UNet2DConditionModel ")


def test_the_trained_weights_come_back(tiny_pipe: Any) -> None:
    before = {KEY: parameter(tiny_pipe, KEY).detach().clone()}
    with torch.no_grad():
        parameter(tiny_pipe, KEY).mul_(1.5)
    trained = parameter(tiny_pipe, KEY).detach().clone()
    edit = Edit.from_change(tiny_pipe, before, method="esd", concept="cat", config=CONFIG)
    with torch.no_grad():
        parameter(tiny_pipe, KEY).copy_(before[KEY])
    torch.testing.assert_close(parameter(edit.apply(tiny_pipe), KEY), trained, rtol=1e-6, atol=1e-8)


def test_text_model_in_a_key_does_not_matter(tiny_pipe: Any) -> None:
    old_name = TEXT_KEY.replace("text_encoder.", "text_encoder.text_model.")
    mask = torch.zeros(parameter(tiny_pipe, TEXT_KEY).shape, dtype=torch.bool)
    mask[0, 0] = True
    made = [
        Edit.from_zeros(tiny_pipe, {key: mask}, method="m", concept="cat", config={}) for key in (TEXT_KEY, old_name)
    ]
    assert made[0].id == made[1].id
    made[1].apply(tiny_pipe)
    assert parameter(tiny_pipe, TEXT_KEY)[0, 0] == 0


def test_an_edit_that_changes_nothing_can_be_applied_and_removed(tiny_pipe: Any, tmp_path: Path) -> None:
    before = {KEY: parameter(tiny_pipe, KEY).detach().clone()}
    Edit.from_change(tiny_pipe, before, method="none", concept="cat", config={}).save(tmp_path / "e.safetensors")
    edit = Edit.load(tmp_path / "e.safetensors")
    untouched = bits(tiny_pipe)
    assert applied(edit.apply(tiny_pipe)) == [(edit.id, 1.0)]
    assert same(bits(edit.remove(tiny_pipe)), untouched)
    assert edit.changed_parameters == 0
    assert Edit.from_change(tiny_pipe, {}, method="none", concept="cat", config={}).id == edit.id


@pytest.mark.parametrize(
    ("key", "tensor", "says"),
    [
        ("unet.conv_in.wieght", torch.zeros(8, 4, 3, 3), "did you mean unet.conv_in.weight?"),
        (KEY, torch.zeros(8, 4), r"has shape \(8, 4, 3, 3\), not \(8, 4\)"),
        ("transformer.conv_in.weight", torch.zeros(1), "has no transformer; it has text_encoder, unet, vae"),
    ],
)
def test_a_key_or_shape_of_another_model_is_refused(tiny_pipe: Any, key: str, tensor: Tensor, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Edit.from_change(tiny_pipe, {key: tensor}, method="m", concept="cat", config={})


def test_no_edit_is_made_of_nan_nor_of_an_edited_pipeline(tiny_pipe: Any) -> None:
    edit = random_change(tiny_pipe, 0)
    edit.apply(tiny_pipe)
    with pytest.raises(UserError, match=f"remove {edit.id} first"):
        zeros(tiny_pipe, 1)
    before = {TEXT_KEY: parameter(tiny_pipe, TEXT_KEY).detach().clone()}
    pipe = copy.deepcopy(tiny_pipe)  # not known to be edited
    with torch.no_grad():
        parameter(pipe, TEXT_KEY)[0, 0] = torch.nan
    with pytest.raises(UserError, match=f"{TEXT_KEY} holds NaN"):
        Edit.from_change(pipe, before, method="m", concept="cat", config={})


# ------------------------------------------------------------ apply, remove, scale, add up


def test_apply_then_remove_gives_the_same_bits(tiny_pipe: Any) -> None:
    with torch.no_grad():
        parameter(tiny_pipe, KEY).view(-1)[:4] = torch.tensor([-0.0, 0.0, 1e-40, 3e38])
    untouched = bits(tiny_pipe)
    edit = random_change(tiny_pipe, 0, (KEY, KEY_2, TEXT_KEY), share=0.5)
    edit.apply(tiny_pipe)
    changed = bits(tiny_pipe)
    assert {key for key in changed if not torch.equal(changed[key], untouched[key])} == {KEY, KEY_2, TEXT_KEY}
    # What the edit leaves alone keeps its bits even while it is applied.
    alone = (edit.delta[KEY].view(-1) == 0).repeat_interleave(4)
    assert torch.equal(changed[KEY][alone], untouched[KEY][alone])
    assert same(bits(edit.remove(tiny_pipe)), untouched)
    assert applied(tiny_pipe) == []


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_edits_add_up_and_leave_in_any_order(tiny_pipe: Any, order: tuple[int, ...]) -> None:
    untouched = bits(tiny_pipe)
    base = parameter(tiny_pipe, KEY).detach().clone()
    edits = [random_change(tiny_pipe, 0), random_change(tiny_pipe, 1, (KEY,)), zeros(tiny_pipe, 0, 5)]
    for i in order:
        edits[i].apply(tiny_pipe)
    both = base + edits[0].delta[KEY] + edits[1].delta[KEY]
    both.view(-1)[[0, 5]] = 0
    torch.testing.assert_close(parameter(tiny_pipe, KEY), both)
    assert applied(tiny_pipe) == sorted((edit.id, 1.0) for edit in edits)

    edits[order[0]].remove(tiny_pipe)
    left = [edits[i] for i in order[1:]]
    mixed = bits(tiny_pipe)
    for edit in left:
        edit.remove(tiny_pipe)
    assert same(bits(tiny_pipe), untouched)
    for edit in reversed(left):
        edit.apply(tiny_pipe)
    assert same(bits(tiny_pipe), mixed)


def test_the_sum_does_not_depend_on_the_order_of_applying(tiny_pipe: Any) -> None:
    edits = [random_change(tiny_pipe, seed) for seed in range(4)]
    for edit, scale in zip(edits, (1, 0.3, -0.7, 2), strict=True):
        edit.apply(tiny_pipe, scale)
    first = bits(tiny_pipe)
    for edit in edits:
        edit.remove(tiny_pipe)
    for edit, scale in reversed(list(zip(edits, (1, 0.3, -0.7, 2), strict=True))):
        edit.apply(tiny_pipe, scale)
    assert same(bits(tiny_pipe), first)


def test_applying_again_sets_the_scale(tiny_pipe: Any) -> None:
    untouched = bits(tiny_pipe)
    base = parameter(tiny_pipe, KEY).detach().clone()
    edit = random_change(tiny_pipe, 0)
    for scale in (1.0, 1.0, 0.5, -2.0):
        edit.apply(tiny_pipe, scale)
        torch.testing.assert_close(parameter(tiny_pipe, KEY), base + scale * edit.delta[KEY])
        assert applied(tiny_pipe) == [(edit.id, scale)]
    edit.apply(tiny_pipe, 0)
    assert same(bits(tiny_pipe), untouched)
    assert applied(tiny_pipe) == [(edit.id, 0.0)]
    assert same(bits(edit.remove(tiny_pipe)), untouched)


def test_zeroed_positions_join_as_sets(tiny_pipe: Any) -> None:
    untouched = bits(tiny_pipe)
    base = parameter(tiny_pipe, KEY).detach().clone().view(-1)
    first, second = zeros(tiny_pipe, 1, 2), zeros(tiny_pipe, 2, 3)
    first.apply(tiny_pipe)
    second.apply(tiny_pipe)
    expected = base.clone()
    expected[[1, 2, 3]] = 0
    assert torch.equal(parameter(tiny_pipe, KEY).view(-1), expected)
    first.remove(tiny_pipe)
    expected[1] = base[1]
    assert torch.equal(parameter(tiny_pipe, KEY).view(-1), expected)
    second.apply(tiny_pipe, 0)
    assert same(bits(tiny_pipe), untouched)
    assert second.changed_parameters == 2


def test_removed_by_another_copy_of_the_same_edit(tiny_pipe: Any, tmp_path: Path) -> None:
    untouched = bits(tiny_pipe)
    edit = random_change(tiny_pipe, 0)
    edit.save(tmp_path / "edit.safetensors")
    edit.apply(tiny_pipe)
    assert same(bits(Edit.load(tmp_path / "edit.safetensors").remove(tiny_pipe)), untouched)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e38])
def test_a_scale_that_makes_no_weights_is_refused(tiny_pipe: Any, scale: float) -> None:
    edit = random_change(tiny_pipe, 0)
    edit = replace(edit, delta={key: values * 100 for key, values in edit.delta.items()})
    untouched = bits(tiny_pipe)
    with pytest.raises(UserError, match=r"must be finite|overflow"):
        edit.apply(tiny_pipe, scale)
    assert same(bits(tiny_pipe), untouched)
    assert applied(tiny_pipe) == []


def test_zeros_take_no_half_scale(tiny_pipe: Any) -> None:
    untouched = bits(tiny_pipe)
    with pytest.raises(UserError, match=r"scale is 0 or 1, not 0\.5"):
        zeros(tiny_pipe, 1).apply(tiny_pipe, 0.5)
    assert same(bits(tiny_pipe), untouched)


def test_removing_what_is_not_applied_is_refused(tiny_pipe: Any) -> None:
    edit, other = random_change(tiny_pipe, 0), random_change(tiny_pipe, 1)
    with pytest.raises(UserError, match="not applied to this pipeline; applied: none"):
        edit.remove(tiny_pipe)
    other.apply(tiny_pipe)
    with pytest.raises(UserError, match=f"{edit.id} is not applied to this pipeline; applied: {other.id}"):
        edit.remove(tiny_pipe)


def test_what_is_applied_is_known_of_the_components_and_forgotten_with_them(tiny_pipeline_folder: Path) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    gc.collect()
    before = len(edit_module._APPLIED)
    pipe = load_pipe(tiny_pipeline_folder)
    edit = random_change(pipe, 0)
    edit.apply(pipe)
    twin = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    assert applied(twin) == [(edit.id, 1.0)]
    assert applied(load_pipe(tiny_pipeline_folder)) == []
    assert len(edit_module._APPLIED) == before + 1
    del pipe, twin
    gc.collect()
    assert len(edit_module._APPLIED) == before


def test_nothing_is_kept_aside_after_remove(tiny_pipe: Any) -> None:
    wide, narrow = random_change(tiny_pipe, 0), random_change(tiny_pipe, 1, (KEY,))
    wide.apply(tiny_pipe)
    narrow.apply(tiny_pipe)
    wide.remove(tiny_pipe)
    assert list(edit_module._APPLIED[tiny_pipe.unet].originals) == [KEY]
    narrow.remove(tiny_pipe)
    assert tiny_pipe.unet not in edit_module._APPLIED


def test_a_compiled_component_takes_an_edit(tiny_pipe: Any) -> None:
    edit = random_change(tiny_pipe, 0)
    untouched = bits(tiny_pipe)
    unet = tiny_pipe.unet
    tiny_pipe.unet = torch.compile(unet)
    edit.apply(tiny_pipe)
    assert applied(tiny_pipe) == [(edit.id, 1.0)]
    assert not torch.equal(unet.conv_in.weight.reshape(-1).view(torch.uint8), untouched[KEY])
    edit.remove(tiny_pipe)
    tiny_pipe.unet = unet
    assert same(bits(tiny_pipe), untouched)


def test_offloaded_weights_are_refused(tiny_pipe: Any) -> None:
    edit = random_change(tiny_pipe, 0)
    edit.apply(tiny_pipe)
    tiny_pipe.unet.to("meta")
    for call in (edit.apply, edit.remove):
        with pytest.raises(UserError, match="the weights of unet are offloaded"):
            call(tiny_pipe)


# ------------------------------------------------------------ the file


def test_save_and_load(tiny_pipe: Any, tmp_path: Path) -> None:
    file = tmp_path / "new" / "edit.safetensors"
    change = random_change(tiny_pipe, 0, (KEY, KEY_2, TEXT_KEY), share=0.2)
    mask = {KEY: torch.rand(parameter(tiny_pipe, KEY).shape) < 0.3}
    edit = replace(change, zero=mask)
    edit.save(file)
    loaded = Edit.load(file)
    assert loaded.header == edit.header
    assert list(loaded.delta) == list(edit.delta)
    assert all(torch.equal(loaded.delta[key], edit.delta[key]) for key in edit.delta)
    assert torch.equal(loaded.zero[KEY], mask[KEY])
    assert (loaded.id, loaded.nbytes, loaded.changed_parameters) == (edit.id, edit.nbytes, edit.changed_parameters)
    assert edit.nbytes == file.stat().st_size
    assert [f.name for f in file.parent.iterdir()] == [file.name]
    assert edit.changed_parameters == int(
        ((edit.delta[KEY] != 0) | mask[KEY]).sum()
        + edit.delta[KEY_2].count_nonzero()
        + edit.delta[TEXT_KEY].count_nonzero()
    )


def test_the_same_edit_is_the_same_bytes(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    files = []
    for i, order in enumerate([(KEY, KEY_2), (KEY_2, KEY)]):
        pipe = load_pipe(tiny_pipeline_folder)
        before = {key: parameter(pipe, key).detach().clone() for key in order}
        with torch.no_grad():
            for key in order:
                parameter(pipe, key).add_(0.25)
        config = {"seed": 0, "steps": (1, 2)} if i else {"steps": [1, 2], "seed": 0}
        files.append(tmp_path / f"{i}.safetensors")
        Edit.from_change(pipe, before, method="esd", concept="cat", config=config).save(files[i])
    files.append(tmp_path / "2.safetensors")
    Edit.load(files[0]).save(files[2])
    assert len({file.read_bytes() for file in files}) == 1


def test_the_id_tells_edits_apart(tiny_pipe: Any) -> None:
    edit = random_change(tiny_pipe, 0)
    others = [random_change(tiny_pipe, 1), replace(edit, header=replace(edit.header, concept="dog"))]
    assert len({edit.id, *(other.id for other in others)}) == 3
    assert len(edit.id) == 12
    assert edit.id == random_change(tiny_pipe, 0).id


def test_plain_safetensors_reads_an_edit_and_it_names_no_path(tiny_pipe: Any, tmp_path: Path) -> None:
    file = tmp_path / "edit.safetensors"
    edit = random_change(tiny_pipe, 0)
    edit.save(file)
    tensors = load_file(file)
    assert torch.equal(tensors[KEY], edit.delta[KEY])
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["unpaint"])
    assert header == read_header(file)
    assert sorted(header) == sorted([*FIELDS, "shapes", "payload_sha256", "sha256"])
    assert header["config"] == CONFIG
    assert str(tmp_path).encode() not in file.read_bytes()


def test_a_save_that_fails_leaves_the_old_file(tiny_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "edit.safetensors"
    random_change(tiny_pipe, 0).save(file)
    old = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        random_change(tiny_pipe, 1).save(file)
    assert file.read_bytes() == old
    assert list(tmp_path.iterdir()) == [file]


def sparse(values: list[float], size: int) -> np.ndarray:
    return np.array(values + [0.0] * (size - len(values)), np.float32)


@pytest.mark.parametrize(
    ("delta", "stored"),
    [
        (sparse([0.1] * 49, 100), {"k:index": "I32", "k:value": "F32"}),
        (sparse([0.1] * 50, 100), {"k": "F32"}),
        (sparse([0.5] * 33, 100), {"k:index": "I32", "k:value": "F16"}),
        (sparse([0.5] * 34, 100), {"k": "F16"}),
        (sparse([2.0**-100] * 100, 100), {"k": "BF16"}),
        (sparse([2.0**-25, 2.0**17] * 50, 100), {"k": "BF16"}),
        (sparse([2.0**-24, 65504.0] * 50, 100), {"k": "F16"}),
        (sparse([1e5, 0.1] * 50, 100), {"k": "F32"}),
    ],
)
def test_a_delta_is_stored_in_its_smallest_exact_form(delta: np.ndarray, stored: dict[str, str]) -> None:
    tensors = edit_header.encode({"k": delta.reshape(4, 25)}, {})
    assert {name: tensor.dtype for name, tensor in tensors.items()} == stored
    back, _ = edit_header.decode({"shapes": {"k": [4, 25]}}, tensors)
    assert back["k"].tobytes() == delta.tobytes()


@pytest.mark.parametrize(("count", "form"), [(3, "zero_index"), (4, "zero_bits"), (125, "zero_bits")])
def test_zeros_are_stored_as_positions_or_bits(count: int, form: str) -> None:
    mask = np.zeros(125, np.bool_)
    mask[:count] = True
    tensors = edit_header.encode({}, {"k": mask.reshape(5, 25)})
    assert list(tensors) == [f"k:{form}"]
    _, back = edit_header.decode({"shapes": {"k": [5, 25]}}, tensors)
    assert np.array_equal(back["k"], mask.reshape(5, 25))


# ------------------------------------------------------------ refusals: the file


@pytest.fixture
def small_file(tiny_pipe: Any, tmp_path: Path) -> Path:
    """A file with each form of tensor in it."""
    change = random_change(tiny_pipe, 0, ("unet.conv_in.bias", "unet.conv_out.bias"))
    delta = {**change.delta, "unet.conv_in.bias": change.delta["unet.conv_in.bias"] * torch.eye(8)[3]}
    mask = {"unet.conv_in.bias": torch.arange(8) < 4, KEY: torch.arange(288).reshape(8, 4, 3, 3) == 2}
    file = tmp_path / "small.safetensors"
    replace(change, delta=delta, zero=mask).save(file)
    return file


def test_any_altered_byte_is_refused(small_file: Path) -> None:
    good = small_file.read_bytes()
    names = set(load_file(small_file))
    assert {name.partition(":")[2] for name in names} == {"", "index", "value", "zero_index", "zero_bits"}
    bad_file = small_file.with_name("bad.safetensors")
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= (0x01, 0x20, 0x80)[position % 3]
        bad_file.write_bytes(bad)
        with pytest.raises(UserError) as refusal:
            read_header(bad_file)
        assert str(bad_file) in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_a_truncated_file_is_refused(small_file: Path) -> None:
    good = small_file.read_bytes()
    short_file = small_file.with_name("short.safetensors")
    for length in [*range(0, len(good), 7), len(good) - 1]:
        short_file.write_bytes(good[:length])
        with pytest.raises(UserError, match=r"empty|not a safetensors|truncated"):
            Edit.load(short_file)
    short_file.write_bytes(good + b"\0")
    with pytest.raises(UserError, match="1 bytes too many"):
        Edit.load(short_file)


def test_what_is_no_edit_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    with pytest.raises(UserError, match=r"no edit file .*file\.safetensors"):
        Edit.load(file)
    with pytest.raises(UserError, match="no edit file"):
        Edit.load(tmp_path)
    file.write_bytes(b"a picture of a cat" * 100)
    with pytest.raises(UserError, match="is not a safetensors file"):
        Edit.load(file)
    save_file({"unet.w": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="is not an edit of unpaint"):
        Edit.load(file)
    save_file({"unet.w": torch.zeros(2)}, file, metadata={"unpaint": "{}"})
    with pytest.raises(UserError, match="header cannot be read"):
        Edit.load(file)


FIELDS = {
    "format": 1,
    "base": {"architecture": {"unet": "UNet 0"}, "hash": "0"},
    "method": "esd",
    "concept": "cat",
    "config": {},
    "version": "1",
}


def write(
    file: Path,
    tensors: dict[str, Stored],
    shapes: dict[str, list[int]],
    change: Callable[[dict], None] = lambda header: None,
) -> None:
    """A file of unpaint's own making with right checksums, whatever it holds."""
    fields = copy.deepcopy(FIELDS)
    change(fields)
    file.write_bytes(edit_header.to_bytes(edit_header.seal(fields, shapes, tensors), tensors))


def stored(dtype: str, values: np.ndarray) -> Stored:
    return Stored(dtype, list(values.shape), values.reshape(-1).view(np.uint8))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda header: header.update(format=2), "has edit format 2; this unpaint reads format 1 only"),
        (lambda header: header.update(format="1"), "header cannot be read"),
        (lambda header: header.pop("concept"), "no proper `concept`"),
        (lambda header: header.update(base={"hash": "0"}), "no proper `base`"),
        (lambda header: header["base"].update(architecture={"transformer": "x"}), "no component for unet.w"),
    ],
)
def test_a_header_of_another_kind_is_refused(tmp_path: Path, change: Callable[[dict], None], says: str) -> None:
    file = tmp_path / "edit.safetensors"
    tensors = {"unet.w": stored("F32", np.ones(2, np.float32))}
    write(file, tensors, {"unet.w": [2]})
    assert read_header(file)["method"] == "esd"
    write(file, tensors, {"unet.w": [2]}, change)
    with pytest.raises(UserError, match=says):
        read_header(file)


F32 = np.float32
I32 = np.int32


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"unet.w": stored("F32", np.ones(5, F32))}, "does not fit"),
        ({"unet.w": stored("F32", np.array([1, np.nan, 1, 1], F32))}, "NaN or infinity"),
        ({"unet.w": stored("F16", np.array([1, np.inf, 1, 1], np.float16))}, "NaN or infinity"),
        ({"unet.w": stored("BF16", np.array([0x7F80, 0, 0, 0], np.uint16))}, "NaN or infinity"),
        ({"unet.w": stored("I32", np.ones(4, I32))}, "does not fit"),
        ({"unet.w:index": stored("I32", np.array([1], I32))}, "does not fit"),
        ({"unet.w:value": stored("F32", np.ones(1, F32))}, "does not fit"),
        *(
            ({"unet.w:index": stored("I32", np.array(i, I32)), "unet.w:value": stored("F32", np.ones(2, F32))}, "fit")
            for i in ([1, 4], [-1, 2], [2, 1], [1, 1], [0, 1, 2])
        ),
        ({"unet.w:zero_index": stored("I32", np.array([4], I32))}, "does not fit"),
        ({"unet.w:zero_bits": stored("U8", np.array([0x08], np.uint8))}, "does not fit"),
        ({"unet.w:zero_bits": stored("U8", np.array([0x80, 0], np.uint8))}, "does not fit"),
        ({"unet.w:other": stored("F32", np.ones(4, F32))}, "does not fit"),
        ({"unet.v": stored("F32", np.ones(4, F32))}, "no shape for unet.v"),
        ({}, "holds nothing for unet.w"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, tensors: dict[str, Stored], says: str) -> None:
    write(tmp_path / "edit.safetensors", tensors, {"unet.w": [4]})
    with pytest.raises(UserError, match=says):
        Edit.load(tmp_path / "edit.safetensors")


@pytest.mark.parametrize(("name", "dtype"), [("unet.w", torch.float64), ("unet.w:zero_index", torch.int64)])
def test_a_dtype_that_edits_do_not_use_is_refused(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    tensor = torch.ones(4, dtype=dtype)
    code = {torch.float64: "F64", torch.int64: "I64"}[dtype]
    header = edit_header.seal(FIELDS, {"unet.w": [4]}, {name: Stored(code, [4], tensor.view(torch.uint8).numpy())})
    save_file({name: tensor}, tmp_path / "e.safetensors", {"unpaint": edit_header.canonical_json(header)})
    with pytest.raises(UserError, match=f"{name} does not fit"):
        Edit.load(tmp_path / "e.safetensors")


# ------------------------------------------------------------ refusals: the pipeline


def assert_refused(edit: Edit, pipe: Any, says: str) -> None:
    untouched = bits(pipe)
    with pytest.raises(UserError, match=says) as refusal:
        edit.apply(pipe)
    assert "\n" not in str(refusal.value)
    assert same(bits(pipe), untouched)
    assert applied(pipe) == []


def test_another_base_is_refused(tiny_pipe: Any, tiny_v_pipeline_folder: Path) -> None:
    edit = random_change(tiny_pipe, 0, (KEY, TEXT_KEY))
    other = load_pipe(tiny_v_pipeline_folder)
    made_for, stands = edit.header.base["hash"][:12], random_change(other, 0, (KEY, TEXT_KEY)).header.base["hash"][:12]
    says = (
        f"the edit esd of cat for tiny was made for base weights {made_for}; this StableDiffusionPipeline has {stands}"
    )
    assert_refused(edit, other, says)


def test_one_changed_base_weight_is_refused_and_others_do_not_matter(tiny_pipe: Any) -> None:
    edit = random_change(tiny_pipe, 0, (KEY,))
    with torch.no_grad():
        parameter(tiny_pipe, KEY_2).add_(1)
    edit.apply(tiny_pipe)
    edit.remove(tiny_pipe)
    with torch.no_grad():
        parameter(tiny_pipe, KEY).view(-1)[-1] += 0.1
    assert_refused(edit, tiny_pipe, "was made for base weights")


def test_another_architecture_is_refused(tiny_pipe: Any) -> None:
    from diffusers import UNet2DConditionModel

    edit = random_change(tiny_pipe, 0)
    made_for = edit.header.base["architecture"]["unet"]
    tiny_pipe.unet = UNet2DConditionModel.from_config({**tiny_pipe.unet.config, "block_out_channels": (16, 16)})
    assert_refused(edit, tiny_pipe, f"was made for unet {made_for}; this StableDiffusionPipeline has UNet2DCond")
    named = replace(edit.header, base={**edit.header.base, "architecture": {"transformer": "Flux 0"}})
    assert_refused(replace(edit, header=named), tiny_pipe, "for transformer Flux 0; .* has no transformer")


def test_a_shape_a_key_or_a_number_that_does_not_fit_is_refused(tiny_pipe: Any) -> None:
    edit = random_change(tiny_pipe, 0)
    assert_refused(replace(edit, delta={KEY: edit.delta[KEY][:1]}), tiny_pipe, r"shape \(1, 4, 3, 3\), the pipeline's")
    assert_refused(replace(edit, zero={KEY: torch.ones(3, dtype=torch.bool)}), tiny_pipe, r"shape \(3,\)")
    assert_refused(replace(edit, delta={"unet.x": torch.ones(1)}), tiny_pipe, "which this pipeline has not")
    for bad in (torch.nan, torch.inf):
        values = edit.delta[KEY].clone()
        values[0, 0, 0, 0] = bad
        assert_refused(replace(edit, delta={**edit.delta, KEY: values}), tiny_pipe, "NaN or infinity in unet.conv_in")


# ------------------------------------------------------------ precision


def test_an_edit_made_in_float32_fits_the_model_in_float16(tiny_pipe: Any) -> None:
    edit = random_change(rounded_to_half(tiny_pipe), 0, (KEY, TEXT_KEY))
    wide = parameter(edit.apply(copy.deepcopy(tiny_pipe)), KEY)
    half_pipe = tiny_pipe.to(torch.float16)
    untouched = bits(half_pipe)
    edit.apply(half_pipe)
    assert parameter(half_pipe, KEY).dtype == torch.float16
    assert torch.equal(parameter(half_pipe, KEY), wide.to(torch.float16))
    assert same(bits(edit.remove(half_pipe)), untouched)


def test_float32_weights_loaded_in_float16_are_the_same_base(tiny_pipe: Any, tiny_pipeline_folder: Path) -> None:
    edit = random_change(tiny_pipe, 0, (KEY, TEXT_KEY))
    half_pipe = load_pipe(tiny_pipeline_folder, torch.float16)
    edit.apply(half_pipe)
    assert applied(half_pipe) == [(edit.id, 1.0)]


def test_a_model_loaded_in_bfloat16_is_refused_with_the_reason(tiny_pipe: Any, tiny_pipeline_folder: Path) -> None:
    edit = random_change(tiny_pipe, 0)
    assert_refused(edit, load_pipe(tiny_pipeline_folder, torch.bfloat16), "loaded in bfloat16, which rounds them")


def test_an_edit_made_in_bfloat16_fits_its_base_and_its_folder(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    pipe = load_pipe(tiny_pipeline_folder, torch.bfloat16)
    untouched = bits(pipe)
    edit = random_change(pipe, 0, (KEY, TEXT_KEY))
    edit.save(tmp_path / "edit.safetensors")
    assert base_mismatch(read_header(tmp_path / "edit.safetensors"), tiny_pipeline_folder) is None
    edit.apply(pipe)
    assert not same(bits(pipe), untouched)
    assert same(bits(edit.remove(pipe)), untouched)


def test_the_base_moved_to_another_dtype_while_edited(tiny_pipe: Any) -> None:
    base = parameter(tiny_pipe, KEY).detach().clone()
    edit = random_change(tiny_pipe, 0)
    edit.apply(tiny_pipe)
    tiny_pipe.to(torch.float16)
    edit.remove(tiny_pipe)
    assert torch.equal(parameter(tiny_pipe, KEY), base.to(torch.float16))


# ------------------------------------------------------------ a model's folder


def header_of(edit: Edit, folder: Path) -> dict[str, Any]:
    edit.save(folder / "edit.safetensors")
    return read_header(folder / "edit.safetensors")


def test_base_mismatch_of_a_folder(
    tiny_pipe: Any, tiny_pipeline_folder: Path, tiny_v_pipeline_folder: Path, tmp_path: Path
) -> None:
    header = header_of(random_change(tiny_pipe, 0, (KEY, TEXT_KEY)), tmp_path)
    assert base_mismatch(header, tiny_pipeline_folder) is None
    message = base_mismatch(header, tiny_v_pipeline_folder)
    assert message is not None
    assert f"was made for base weights {header['base']['hash'][:12]}; the model in {tiny_v_pipeline_folder}" in message
    header["base"]["architecture"]["unet"] = "UNet2DConditionModel 000000000000"
    message = base_mismatch(header, tiny_pipeline_folder)
    assert message is not None
    assert "was made for unet UNet2DConditionModel 000000000000; " in message
    header["base"]["architecture"] = {"transformer": "FluxTransformer2DModel 0"}
    assert "has no transformer" in (base_mismatch(header, tiny_pipeline_folder) or "")


def test_base_mismatch_of_other_ways_to_keep_the_same_weights(
    tiny_pipe: Any, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    header = header_of(random_change(tiny_pipe, 0, (KEY, TEXT_KEY)), tmp_path)
    folder = tmp_path / "half"
    tiny_pipe.to(torch.float16).save_pretrained(folder, variant="fp16")
    text = next((folder / "text_encoder").glob("*.safetensors"))
    # As older checkpoints have it: names with `text_model.`, and position ids among the weights.
    old = {f"text_model.{key}": weight for key, weight in load_file(text).items()}
    save_file({**old, "text_model.embeddings.position_ids": torch.arange(24)}, text)
    assert base_mismatch(header, folder) is None
    unet = next((folder / "unet").glob("*.safetensors"))
    weights = load_file(unet)
    weights["conv_in.weight"] += 1
    save_file(weights, unet)
    assert "was made for base weights" in (base_mismatch(header, folder) or "")


def test_base_mismatch_does_not_guess(tiny_pipe: Any, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    header = header_of(random_change(tiny_pipe, 0), tmp_path)
    header["base"]["hash"] = "0" * 64
    assert base_mismatch(header, tmp_path / "nowhere") is None
    folder = tmp_path / "model"
    tiny_pipe.save_pretrained(folder)
    assert base_mismatch(header, folder) is not None
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    unet.write_bytes(unet.read_bytes()[:1000])
    assert base_mismatch(header, folder) is None
    unet.unlink()
    assert base_mismatch(header, folder) is None
    tiny_pipe.unet.save_pretrained(folder / "unet", max_shard_size="100KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    assert base_mismatch(header, folder) is None


def test_the_header_is_read_without_torch(tiny_pipe: Any, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    header_of(random_change(tiny_pipe, 0), tmp_path)
    code = (
        "import sys; from pathlib import Path; from unpaint.edit_header import base_mismatch, read_header\n"
        "assert base_mismatch(read_header(sys.argv[1]), Path(sys.argv[2])) is None\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "edit.safetensors"), str(tiny_pipeline_folder)]
    subprocess.run(command, check=True, timeout=60)


# ------------------------------------------------------------ export


def test_export_writes_a_folder_that_plain_diffusers_loads(tiny_pipe: Any, tmp_path: Path) -> None:
    untouched = bits(tiny_pipe)
    edit = random_change(tiny_pipe, 0, (KEY, TEXT_KEY))
    folder = tmp_path / "out" / "erased"
    edit.export(tiny_pipe, folder)
    assert same(bits(tiny_pipe), untouched)
    assert applied(tiny_pipe) == []
    exported = load_pipe(folder)
    assert same(bits(exported), bits(edit.apply(tiny_pipe)))
    with pytest.raises(UserError, match="not empty"):
        edit.export(tiny_pipe, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["erased"]


def test_export_of_an_applied_edit_keeps_its_scale(tiny_pipe: Any, tmp_path: Path) -> None:
    edit = random_change(tiny_pipe, 0)
    edit.apply(tiny_pipe, 0.5)
    edited = bits(tiny_pipe)
    edit.export(tiny_pipe, tmp_path / "erased")
    assert same(bits(load_pipe(tmp_path / "erased")), edited)
    assert same(bits(tiny_pipe), edited)
    assert applied(tiny_pipe) == [(edit.id, 0.5)]


def test_an_export_that_fails_leaves_no_trace(tiny_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    untouched = bits(tiny_pipe)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny_pipe.vae, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        random_change(tiny_pipe, 0).export(tiny_pipe, tmp_path / "erased")
    assert same(bits(tiny_pipe), untouched)
    assert list(tmp_path.iterdir()) == []
