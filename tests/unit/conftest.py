"""Judges of random weights, made from transformers' own classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from unpaint.config import compose, instantiate
from unpaint.methods.base import Job
from unpaint.model import load_model

DETECTOR_LABELS = (
    "object/cat",
    "object/dog",
    "object/bird",
    "style/flat",
    "style/mosaic",
    "style/none",
    "setting/beach",
    "setting/night",
    "setting/none",
)


@pytest.fixture(scope="session")
def tiny_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel folder with tokenizer and image processor: 32x32 pictures, 24 tokens. Not to be written to."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz,"
    vocab = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    text = {
        "vocab_size": len(vocab),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNetForImageClassification folder in the manner of Picturebook's detector. Not to be written to."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    folder = tmp_path_factory.mktemp("detector")
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(DETECTOR_LABELS)),
        label2id={label: i for i, label in enumerate(DETECTOR_LABELS)},
    )
    config.thresholds = {label: 0.5 for label in DETECTOR_LABELS if label.startswith("object/")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNetForImageClassification(config)
    model.half().save_pretrained(folder)
    return folder


Begun = Callable[..., tuple[Any, list[Tensor]]]


@pytest.fixture
def begun(tiny_pipeline_folder: Path, tmp_path: Path) -> Begun:
    """`begun("method=esd", "concept=cat", ...)`: a method that has begun on the tiny pipeline, outside of Lightning,
    and the list that collects the losses it hands to `job.update`; nothing is back-propagated and no weight moves."""

    def begin(*options: str) -> tuple[Any, list[Tensor]]:
        cfg = compose(["model=sd15", f"model.path={tiny_pipeline_folder}", *options])
        if "sampling_steps" in cfg.method:
            cfg.method.sampling_steps = 4
        method = instantiate(cfg.method)
        model = load_model(cfg.model)
        losses: list[Tensor] = []
        method.begin(
            Job(
                model=model,
                concept=instantiate(cfg.concept),
                beside=(),
                seed=0,
                weights=model.group(method.group),
                base=model.base_weights(method.group),
                config={},
                cache=tmp_path,
                mine=slice(None),
                update=lambda loss, i=0, adjust=None: losses.append(loss),
                step=lambda i=0: None,
                total=lambda tensor: tensor,
                progress=lambda text, total: lambda n: None,
                account=lambda seconds: None,
            )
        )
        return method, losses

    return begin
