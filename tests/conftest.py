"""Tiny pipelines of random weights, made from diffusers' and transformers' own classes, without a network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from unpaint.files import WEIGHTS

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

MAX_TOKENS = 24
TEXT_WIDTH = 32


def _tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that knows the words of a few prompts and spells out any other word of letters and digits."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
    merges = ["a t</w>", "c at</w>", "d o", "do g</w>", "i n</w>", "o n</w>"]
    vocab = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS})
    )
    return CLIPTokenizer.from_pretrained(folder)


def _make_pipeline(folder: Path, prediction_type: str, seed: int) -> Path:
    """A StableDiffusionPipeline folder: 64x64 pictures, 4x8x8 latents, text of 24 x 32."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = _tokenizer(folder / "own_tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=TEXT_WIDTH,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            norm_num_groups=2,
            latent_channels=4,
            sample_size=64,
        )
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a tiny pipeline with random weights that predicts epsilon. Not to be written to."""
    return _make_pipeline(tmp_path_factory.mktemp("tiny"), "epsilon", seed=0)


@pytest.fixture(scope="session")
def tiny_v_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as `tiny_pipeline_folder`, of other random weights, that predicts v."""
    return _make_pipeline(tmp_path_factory.mktemp("tiny_v"), "v_prediction", seed=1)


@pytest.fixture
def tiny_pipe(tiny_pipeline_folder: Path) -> Any:
    """A fresh copy of the tiny pipeline in float32 on the CPU, a test's own to change."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def small(tiny_pipeline_folder: Path) -> list[str]:
    """The overrides of a run of seconds: random weights, twelve steps, few pictures. Of an option given twice the last
    value counts."""
    return [
        "model=sd15",
        f"model.path={tiny_pipeline_folder}",
        f"evaluator.detector.path={WEIGHTS / 'detector'}",
        "~metric@evaluator.metrics.clip_score",
        "concept=cat",
        "trainer=cpu",
        "probes=0",
        "method.steps=12",
        "method.sampling_steps=4",
        "method.bank_size=16",
        "concept.evaluation.target_pictures=16",
        "concept.evaluation.per_label=2",
        "evaluator.sampler.steps=2",
    ]


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """What trains within `with stopping():` ends by InterruptedError once the state of its first step is saved."""
    from unpaint.training.erasing import SaveState

    save = SaveState.on_train_batch_end

    def save_and_stop(self: SaveState, *arguments: Any) -> None:
        save(self, *arguments)
        raise InterruptedError

    @contextmanager
    def stop() -> Iterator[None]:
        with monkeypatch.context() as context:
            context.setattr(SaveState, "on_train_batch_end", save_and_stop)
            with pytest.raises(InterruptedError):
                yield

    return stop
