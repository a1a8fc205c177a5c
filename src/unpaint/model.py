"""TextToImage, a Stable Diffusion pipeline behind one small interface, and `load_model`, which makes one."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from unpaint.edit import text_edits
from unpaint.errors import UserError, nearest
from unpaint.files import WEIGHTS

if TYPE_CHECKING:
    from omegaconf import DictConfig

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GROUPS = (
    "cross_attention.kv",
    "cross_attention.qkv",
    "cross_attention",
    "feed_forward.out",
    "not_cross_attention",
    "all",
)
CACHED_TEXTS = 1024
# What diffusers, transformers and safetensors raise on missing, truncated or ill-shaped files.
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError)


class TextToImage:
    """A frozen Stable Diffusion 1.x/2.x pipeline: text to latents to pictures, and named groups of editable weights.

    A plain object, not a module: a LightningModule that holds one keeps the frozen parts out of its checkpoints.
    All parameters start without gradients, all parts in eval mode; whoever trains a group asks for its gradients.

    Attributes: `pipe` (the diffusers pipeline, its scheduler untouched), `name`, `device`, `dtype`, `latent_shape`
    (C, h, w), `prediction_type` (epsilon or v_prediction), `alphas_cumprod` (T,) float32, and `fingerprint`: 12 hex
    digits over the weights of UNet, text encoder and VAE as they were when this object was made.
    """

    def __init__(self, pipe: Any, name: str) -> None:
        from diffusers import DDIMScheduler

        _refuse_unlike_sd(pipe)
        self.pipe = pipe
        self.name = name
        for part in (pipe.unet, pipe.text_encoder, pipe.vae):
            part.requires_grad_(False).eval()
        pipe.set_progress_bar_config(disable=True)
        self.device: torch.device = pipe.unet.device
        self.dtype: torch.dtype = pipe.unet.dtype
        size = pipe.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape: tuple[int, int, int] = (pipe.unet.config.in_channels, height, width)
        # Latents are never clipped; a scheduler whose config is silent on it would make DDIM do so.
        self.scheduler_config = {**pipe.scheduler.config, "clip_sample": False}
        self.prediction_type: str = self.scheduler_config.get("prediction_type", "epsilon")
        self.alphas_cumprod: Tensor = DDIMScheduler.from_config(self.scheduler_config).alphas_cumprod.to(self.device)
        # At once, not when first asked: by then the UNet may have been edited or trained.
        self.fingerprint: str = _fingerprint(pipe)
        self._texts: OrderedDict[tuple[str, tuple[tuple[str, float], ...]], Tensor] = OrderedDict()
        self._warned_of_truncation = False
        self._parameter_names = frozenset(f"unet.{key}" for key, _ in pipe.unet.named_parameters())

    def to(self, device: str | torch.device) -> TextToImage:
        """Move everything to `device`, in place."""
        self.pipe.to(device)
        self.device = self.pipe.unet.device
        self.alphas_cumprod = self.alphas_cumprod.to(self.device)
        self._texts.clear()
        return self

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (B, L, D) of B prompts, without gradients; each prompt is encoded once and remembered, for
        the edits that the text encoder has.

        Every prompt runs through the text encoder alone, so its embedding never depends on its neighbours. A prompt
        longer than the tokenizer allows is cut, with a warning the first time.
        """
        if isinstance(prompts, str):
            raise TypeError("encode takes a list of prompts, not one string")
        # The cache must hold ordinary tensors: inference tensors cannot take part in training later.
        # And full precision: under autocast what is remembered would depend on who asked first.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return torch.cat([self._encode_one(prompt) for prompt in prompts])

    def _encode_one(self, prompt: str) -> Tensor:
        key = (prompt, text_edits(self.pipe))
        if key in self._texts:
            self._texts.move_to_end(key)
            return self._texts[key]
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        length = prompt_length(tokenizer, encoder.config)
        tokens = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        if not self._warned_of_truncation and len(tokenizer(prompt, verbose=False).input_ids) > length:
            self._warned_of_truncation = True
            warnings.warn(f"prompt longer than {length} tokens, its end is ignored: {prompt!r}", stacklevel=3)
        uses_mask = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(self.device) if uses_mask else None
        text = encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0].to(self.dtype)
        self._texts[key] = text
        if len(self._texts) > CACHED_TEXTS:
            self._texts.popitem(last=False)
        return text

    def output(
        self, latents: Tensor, t: Tensor | int, text: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """What the UNet itself returns, epsilon or v, (B, C, h, w); arguments as in `predict`."""
        unet = self.pipe.unet
        if weights is None:
            return unet(latents, t, encoder_hidden_states=text, return_dict=False)[0]
        strangers = weights.keys() - self._parameter_names
        if strangers:
            stranger = min(strangers)
            raise KeyError(f"{stranger!r} is no parameter of the UNet{nearest(stranger, self._parameter_names)}")
        inner = {key.removeprefix("unet."): value for key, value in weights.items()}
        arguments = {"encoder_hidden_states": text, "return_dict": False}
        return torch.func.functional_call(unet, inner, (latents, t), arguments)[0]

    def predict(
        self, latents: Tensor, t: Tensor | int, text: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The predicted noise epsilon (B, C, h, w) for latents (B, C, h, w), t (B,) or int, text (B, L, D).

        A network that predicts v (Salimans & Ho 2022, arXiv 2202.00512, appendix D) is converted:
        epsilon = sqrt(abar_t) v + sqrt(1 - abar_t) x_t. `weights`, keyed like `group()`, stand in for the UNet's own
        tensors of those names in this call: with the base tensors of a trained group the student is its own teacher.
        Raises KeyError on a key that is no parameter of the UNet.
        """
        output = self.output(latents, t, text, weights)
        if self.prediction_type == "epsilon":
            return output
        abar = self.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return abar.sqrt().to(output.dtype) * output + (1 - abar).sqrt().to(output.dtype) * latents

    def latents_of(self, pictures: Tensor) -> Tensor:
        """The latents (B, C, h, w) as which the VAE encodes uint8 pictures (B, 3, H, W): the mean of what it says."""
        vae = self.pipe.vae
        with torch.no_grad():
            encoded = vae.encode(pictures.to(self.device, vae.dtype) / 127.5 - 1).latent_dist.mode()
        return (encoded - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) between 0 and 1, in the VAE's dtype, of latents (B, C, h, w); differentiable."""
        vae = self.pipe.vae
        latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        pictures = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return (pictures * 0.5 + 0.5).clamp(0, 1)

    def group(self, name: str) -> dict[str, nn.Parameter]:
        """The UNet's own parameters of a named group, keyed `unet.<diffusers name>`, in the network's order.

        - `cross_attention.kv`: `attn2.to_k.*`, `attn2.to_v.*` (ESD-x-strict, UCE)
        - `cross_attention.qkv`: those and `attn2.to_q.*`, all but the output projection (TRUST)
        - `cross_attention`: `attn2.*` (ESD-x)
        - `feed_forward.out`: `ff.net.2.weight`, the second linear layer of each feed-forward block (ConceptPrune)
        - `not_cross_attention`: all but `attn2.*`, norms and time embedding included (ESD-u)
        - `all`: every parameter of the UNet

        Several, `cross_attention+feed_forward.out`: what is in any of them. Raises UserError on an unknown name, or
        when this UNet has no such parameters.
        """
        names = name.split("+")
        for part in names:
            if part not in GROUPS:
                raise UserError(f"unknown weight group '{part}', there are {', '.join(GROUPS)}{nearest(part, GROUPS)}")
        found = {
            f"unet.{key}": p
            for key, p in self.pipe.unet.named_parameters()
            if any(_in_group(f".{key}", part) for part in names)
        }
        if not found:
            raise UserError(f"model '{self.name}' has no weights in group '{name}'")
        return found

    def base_weights(self, group: str) -> dict[str, Tensor]:
        """Detached copies of a group's tensors as they are now, keyed like `group()`."""
        return {key: p.detach().clone() for key, p in self.group(group).items()}


def prompt_length(tokenizer: Any, text_encoder_config: Any) -> int:
    """How many tokens a prompt takes, with both ends."""
    return int(min(tokenizer.model_max_length, text_encoder_config.max_position_embeddings))


def _in_group(key: str, group: str) -> bool:
    cross = ".attn2." in key
    match group:
        case "cross_attention.kv":
            return cross and (".to_k." in key or ".to_v." in key)
        case "cross_attention.qkv":
            return cross and any(f".to_{projection}." in key for projection in "qkv")
        case "cross_attention":
            return cross
        case "feed_forward.out":
            return key.endswith(".ff.net.2.weight")
        case "not_cross_attention":
            return not cross
        case _:
            return True


def load_model(cfg: DictConfig | Mapping[str, Any]) -> TextToImage:
    """Load the pipeline that a model config describes.

    Keys: `name`; `path`, a pipeline folder; `hub`, a Hugging Face id used when there is no path; with neither, the
    weights in the package. `device` is auto, cpu or cuda (auto: cuda if there is one); `dtype` float32, float16 or
    bfloat16. A hub model comes from the local cache, else from the network.
    Raises UserError: not a pipeline, not like Stable Diffusion 1.x/2.x, damaged, or out of reach.
    """
    device = _device(str(cfg.get("device") or "auto"))
    dtype_name = str(cfg.get("dtype") or "float32")
    if dtype_name not in DTYPES:
        raise UserError(f"model.dtype is {', '.join(DTYPES)}, not '{dtype_name}'{nearest(dtype_name, DTYPES)}")
    with _quiet():
        if cfg.get("hub") and not cfg.get("path"):
            pipe = _from_hub(str(cfg["hub"]), DTYPES[dtype_name])
        else:
            pipe = _from_folder(Path(cfg.get("path") or WEIGHTS).expanduser(), DTYPES[dtype_name])
    return TextToImage(pipe.to(device), str(cfg["name"]))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"model.device is auto, cpu or cuda, not '{name}'{nearest(name, ('auto', 'cpu', 'cuda'))}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("model.device=cuda, but PyTorch finds no CUDA device here; use model.device=auto or cpu")
    return torch.device(name)


def _from_folder(folder: Path, dtype: torch.dtype) -> Any:
    index = folder / "model_index.json"
    if not index.is_file():
        hint = "; build them with scripts/build_picturebook.py" if folder == WEIGHTS else ""
        raise UserError(f"model.path: '{folder}' is not a diffusers pipeline folder (no model_index.json){hint}")
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model.path: '{index}' is not valid JSON: {error}") from error
    _refuse_parts_unlike_sd(parts, str(folder))
    try:
        return _pretrained(folder, dtype, local_files_only=True)
    except _LOAD_ERRORS as error:
        raise UserError(f"model.path: '{folder}' does not load: {_first_line(error)}") from error


def _from_hub(hub: str, dtype: torch.dtype) -> Any:
    from diffusers import StableDiffusionPipeline
    from huggingface_hub import constants
    from huggingface_hub.utils import enable_progress_bars

    def fetch(local: bool) -> Any:
        if not local:  # gigabytes: show how far it is
            enable_progress_bars()
        parts = StableDiffusionPipeline.load_config(hub, local_files_only=local)
        _refuse_parts_unlike_sd(parts, hub)
        return _pretrained(hub, dtype, local_files_only=local)

    try:
        return fetch(local=True)
    except _LOAD_ERRORS as error:
        reason = _first_line(error)
    if reachable(constants.ENDPOINT, constants.HF_HUB_OFFLINE):
        try:
            return fetch(local=False)
        except _LOAD_ERRORS as error:
            raise UserError(
                f"model '{hub}' cannot be fetched from {constants.ENDPOINT}: {_first_line(error)}"
            ) from error
    raise UserError(
        f"model '{hub}' is not (wholly) in the cache {constants.HF_HUB_CACHE} ({reason}) and {constants.ENDPOINT} is "
        f"out of reach; where there is a network: hf download {hub}, or give a folder: model.path=<folder>"
    )


def _pretrained(source: str | Path, dtype: torch.dtype, local_files_only: bool) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(
        source,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=local_files_only,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def reachable(endpoint: str, offline: bool) -> bool:
    """Whether a connection opens at all: without it huggingface_hub retries for half a minute."""
    if offline:
        return False
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    address = urlsplit(endpoint)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=3):
            return True
    except OSError:
        return False


def _refuse_parts_unlike_sd(parts: Mapping[str, Any], source: str) -> None:
    """Refuse by model_index.json, before gigabytes are read."""
    kind = parts.get("_class_name", "?")
    wanted = "unpaint takes Stable Diffusion 1.x and 2.x pipelines"
    if parts.get("text_encoder_2") or parts.get("text_encoder_3"):
        raise UserError(f"model '{source}' is a {kind} with several text encoders; {wanted}")
    missing = [part for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler") if not parts.get(part)]
    if missing:
        raise UserError(f"model '{source}' is a {kind} without {', '.join(missing)}; {wanted}")


def _refuse_unlike_sd(pipe: Any) -> None:
    unet, vae = pipe.unet.config, pipe.vae.config
    wanted = "unpaint takes Stable Diffusion 1.x and 2.x pipelines"
    if type(pipe.unet).__name__ != "UNet2DConditionModel":
        raise UserError(f"the denoiser is a {type(pipe.unet).__name__}, not a UNet2DConditionModel; {wanted}")
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise UserError(
            f"the UNet takes {unet.in_channels} and returns {unet.out_channels} channels, the autoencoder's latents "
            f"have {vae.latent_channels} (an inpainting or upscaling model?); {wanted}"
        )
    for key in ("addition_embed_type", "class_embed_type", "time_cond_proj_dim"):
        if getattr(unet, key, None) is not None:
            raise UserError(f"the UNet wants more than a text as condition ({key}); {wanted}")
    prediction = pipe.scheduler.config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(f"the scheduler's prediction_type is '{prediction}'; unpaint knows epsilon and v_prediction")


def _fingerprint(pipe: Any) -> str:
    digest = hashlib.sha256()
    for part, module in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder), ("vae", pipe.vae)):
        for key, parameter in sorted(module.named_parameters()):
            # transformers has had this prefix and has not, over the same checkpoint
            digest.update(f"{part}.{key.removeprefix('text_model.')}{tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().to("cpu", torch.float16).contiguous().numpy().data)
    return digest.hexdigest()[:12]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and remarks (on torchvision, say) of diffusers and transformers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    logs = (diffusers_logging, transformers_logging)
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # diffusers passes huggingface_hub an argument that the latter has dropped
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            yield
    finally:
        for log, verbosity, bars in before:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()
