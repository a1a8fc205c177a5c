"""TextToImage on tiny pipelines of random weights: what it predicts, encodes, decodes, groups and refuses."""

import json
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from unpaint.edit import Edit, text_edits
from unpaint.errors import UserError
from unpaint.model import GROUPS, TextToImage, load_model


@pytest.fixture(scope="module")
def eps_model(tiny_pipeline_folder: Path) -> TextToImage:
    return load_model({"name": "tiny", "path": str(tiny_pipeline_folder), "device": "cpu"})


@pytest.fixture(scope="module")
def v_model(tiny_v_pipeline_folder: Path) -> TextToImage:
    return load_model({"name": "tiny-v", "path": str(tiny_v_pipeline_folder), "device": "cpu"})


def latents_of(model: TextToImage, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def test_load_freezes_everything_and_names_the_shapes(eps_model: TextToImage) -> None:
    pipe = eps_model.pipe
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())
    assert eps_model.name == "tiny"
    assert eps_model.prediction_type == "epsilon"
    size = pipe.unet.config.sample_size
    assert eps_model.latent_shape == (pipe.unet.config.in_channels, size, size)
    picture = eps_model.decode(latents_of(eps_model, 1))
    assert picture.shape == (1, 3, size * pipe.vae_scale_factor, size * pipe.vae_scale_factor)
    assert picture.min() >= 0
    assert picture.max() <= 1


def test_dtype_is_taken_from_the_config(tiny_pipeline_folder: Path) -> None:
    model = load_model({"name": "tiny", "path": str(tiny_pipeline_folder), "device": "cpu", "dtype": "bfloat16"})
    assert {p.dtype for p in model.group("all").values()} == {torch.bfloat16}
    assert model.encode(["a cat"]).dtype == torch.bfloat16


def test_encode_is_what_the_pipeline_encodes(eps_model: TextToImage) -> None:
    prompts = ["a cat", "a dog at night", "a cat"]
    text = eps_model.encode(prompts)
    theirs, _ = eps_model.pipe.encode_prompt(prompts, torch.device("cpu"), 1, False)
    torch.testing.assert_close(text, theirs)
    assert torch.equal(text[0], text[2])
    assert torch.equal(eps_model.encode(["a dog at night"])[0], text[1])
    with pytest.raises(TypeError, match="list of prompts"):
        eps_model.encode("a cat")


def test_an_edit_of_the_text_encoder_changes_what_is_encoded(tiny_pipeline_folder: Path) -> None:
    model = load_model({"name": "tiny", "path": str(tiny_pipeline_folder), "device": "cpu"})
    pipe, prompts = model.pipe, ["a cat", "a dog"]
    plain = model.encode(prompts)
    name, weight = next((n, w) for n, w in pipe.text_encoder.named_parameters() if n.endswith("fc1.weight"))
    key, before = f"text_encoder.{name}", weight.detach().clone()
    with torch.no_grad():
        weight += 0.1
    edit = Edit.from_change(pipe, {key: before}, method="m", concept="c", config={})
    with torch.no_grad():
        weight.copy_(before)
    edit.apply(pipe)
    edited = model.encode(prompts)
    assert not torch.isclose(edited, plain).all(dim=-1).all(dim=-1).any()
    edit.apply(pipe, scale=0.5)
    assert not torch.equal(model.encode(prompts), edited)
    edit.remove(pipe)
    assert torch.equal(model.encode(prompts), plain)
    assert text_edits(pipe) == ()


def test_a_text_encoded_in_inference_mode_can_be_trained_on(tiny_pipeline_folder: Path) -> None:
    model = load_model({"name": "tiny", "path": str(tiny_pipeline_folder), "device": "cpu"})
    with torch.inference_mode():
        text = model.encode(["a fish"])
    weight = torch.ones(text.shape[-1], 1, requires_grad=True)
    (text @ weight).sum().backward()
    assert weight.grad is not None


def test_a_prompt_that_is_too_long_is_cut_with_one_warning(tiny_pipeline_folder: Path) -> None:
    model = load_model({"name": "tiny", "path": str(tiny_pipeline_folder), "device": "cpu"})
    long = "cat " * 500
    with pytest.warns(UserWarning, match="its end is ignored"):
        text = model.encode([long])
    assert text.shape == model.encode(["a cat"]).shape
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode([long + "dog"])


@pytest.mark.parametrize("t", [torch.tensor([7, 981]), 500])
def test_v_is_converted_to_epsilon(v_model: TextToImage, t: torch.Tensor | int) -> None:
    x, text = latents_of(v_model, 2), v_model.encode(["a cat", "a dog"])
    with torch.no_grad():
        epsilon = v_model.predict(x, t, text)
        v = v_model.pipe.unet(x, t, encoder_hidden_states=text).sample
    abar = v_model.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    # The clean latent is abar^.5 x - (1 - abar)^.5 v; x is that clean latent plus the noise we were told of.
    clean = abar.sqrt() * x - (1 - abar).sqrt() * v
    torch.testing.assert_close(abar.sqrt() * clean + (1 - abar).sqrt() * epsilon, x, rtol=1e-4, atol=1e-5)


def test_epsilon_is_the_unet_itself(eps_model: TextToImage) -> None:
    x, text, t = latents_of(eps_model, 2), eps_model.encode(["a cat", "a dog"]), torch.tensor([7, 981])
    with torch.no_grad():
        expected = eps_model.pipe.unet(x, t, encoder_hidden_states=text).sample
        assert torch.equal(eps_model.predict(x, t, text), expected)


@pytest.mark.parametrize("group", ["cross_attention.kv", "not_cross_attention"])
def test_base_weights_make_the_student_its_own_teacher(tiny_pipeline_folder: Path, group: str) -> None:
    model = load_model({"name": "tiny", "path": str(tiny_pipeline_folder), "device": "cpu"})
    x, text, t = latents_of(model, 2), model.encode(["a cat", "a dog"]), torch.tensor([7, 981])
    base = model.base_weights(group)
    with torch.no_grad():
        before = model.predict(x, t, text)
        for parameter in model.group(group).values():
            parameter.requires_grad_(True).mul_(1.5)
        after = model.predict(x, t, text)
        assert (after - before).abs().max() > 1e-3
        assert torch.equal(model.predict(x, t, text, base), before)
        assert torch.equal(model.predict(x, t, text), after)
    model.predict(x, t, text).square().mean().backward()
    grads = [parameter.grad for parameter in model.group(group).values()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


def test_weights_of_another_name_are_refused(eps_model: TextToImage) -> None:
    x, text = latents_of(eps_model, 1), eps_model.encode(["a cat"])
    with pytest.raises(KeyError, match="no parameter of the UNet"):
        eps_model.predict(x, 1, text, {"unet.conv_inn.weight": torch.zeros(1)})


def test_groups_hold_exactly_their_weights(eps_model: TextToImage) -> None:
    every = {f"unet.{key}" for key, _ in eps_model.pipe.unet.named_parameters()}
    keys = {name: list(eps_model.group(name)) for name in GROUPS}
    for name in GROUPS:
        assert keys[name] == list(eps_model.group(name))
        assert len(set(keys[name])) == len(keys[name]) > 0
    cross, rest = set(keys["cross_attention"]), set(keys["not_cross_attention"])
    assert set(keys["all"]) == every == cross | rest
    assert not cross & rest
    blocks = [name for name, module in eps_model.pipe.unet.named_modules() if name.endswith("transformer_blocks.0")]
    assert blocks
    kv = {f"unet.{block}.attn2.{part}.weight" for block in blocks for part in ("to_k", "to_v")}
    assert set(keys["cross_attention.kv"]) == kv
    queries = {f"unet.{block}.attn2.to_q.weight" for block in blocks}
    assert set(keys["cross_attention.qkv"]) == kv | queries
    out = {f"unet.{block}.attn2.{part}" for block in blocks for part in ("to_out.0.weight", "to_out.0.bias")}
    assert cross == kv | queries | out
    assert set(keys["feed_forward.out"]) == {f"unet.{block}.ff.net.2.weight" for block in blocks}
    assert "unet.time_embedding.linear_1.weight" in rest
    assert f"unet.{blocks[0]}.norm2.weight" in rest


def test_unknown_group_names_the_nearest(eps_model: TextToImage) -> None:
    with pytest.raises(UserError, match=r"did you mean cross_attention\.kv"):
        eps_model.group("cross_atention.kv")


def test_fingerprint_knows_the_weights_and_nothing_else(
    tiny_pipeline_folder: Path, tiny_v_pipeline_folder: Path, eps_model: TextToImage, tmp_path: Path
) -> None:
    again = load_model({"name": "other name", "path": str(shutil.copytree(tiny_pipeline_folder, tmp_path / "copy"))})
    assert again.fingerprint == eps_model.fingerprint
    assert len(again.fingerprint) == 12
    with torch.no_grad():
        next(iter(again.group("all").values())).view(-1)[0] += 1
    assert TextToImage(again.pipe, "tiny").fingerprint != eps_model.fingerprint
    assert again.fingerprint == eps_model.fingerprint  # of the weights as loaded


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a diffusers pipeline folder"):
        load_model({"name": "x", "path": str(tmp_path)})
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_model({"name": "x", "path": str(tmp_path)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, "several text encoders"),
        ({"unet": None, "transformer": ["diffusers", "SD3Transformer2DModel"]}, "without unet"),
    ],
)
def test_a_pipeline_of_another_kind(
    tiny_pipeline_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    index = json.loads((tiny_pipeline_folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(UserError, match=message):
        load_model({"name": "x", "path": str(tmp_path)})


def test_a_damaged_weight_file(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline_folder, tmp_path / "copy")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="does not load"):
        load_model({"name": "x", "path": str(folder)})


def test_a_prediction_type_that_is_not_supported(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline_folder, tmp_path / "copy")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(UserError, match="prediction_type is 'sample'"):
        load_model({"name": "x", "path": str(folder)})


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dtype": "float61"}, "did you mean float16"), ({"device": "cuba"}, "did you mean cuda")],
)
def test_bad_device_and_dtype(tiny_pipeline_folder: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_model({"name": "x", "path": str(tiny_pipeline_folder), **change})


def test_hub_without_cache_and_network_says_where_and_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    # Nothing listens on port 9, so this is a network that is down, not a mock of one.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(key, raising=False)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        load_model({"name": "sd14", "hub": "nobody/no-such-model", "path": None, "device": "cpu"})
    line = str(error.value)
    assert str(tmp_path) in line
    assert "hf download nobody/no-such-model" in line
    assert "model.path=" in line
    assert "\n" not in line
    assert time.monotonic() - start < 10


def test_path_wins_over_hub(tiny_pipeline_folder: Path) -> None:
    model = load_model({"name": "sd14", "hub": "nobody/no-such-model", "path": str(tiny_pipeline_folder)})
    assert model.name == "sd14"
