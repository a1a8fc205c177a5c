"""Judges of random weights, made from transformers' own classes."""

import json
from pathlib import Path

import pytest

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
