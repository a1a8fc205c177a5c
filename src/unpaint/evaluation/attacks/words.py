"""Tokens as attacks see them: which there are, prompts with free places in them, embeddings that no prompt has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unpaint.errors import UserError, nearest
from unpaint.evaluation.attacks import Scene, Terms, Try, digest_of
from unpaint.model import TextToImage, prompt_length
from unpaint.results import write_json

AT_ONCE = 256
SLOTS = ("prefix", "suffix", "every", "replace")


class Words:
    """Tokenizer and text encoder of a model.

    usable: ids (V,) that an attack may propose: each is the only token of its own text, so that a prompt of them is
    tokenised again as it was made, and no special token; of Picturebook's vocabulary only those that its language uses,
    as the others were never trained. table: their embeddings (V, D), float32. length: tokens of a prompt, with both
    ends.
    """

    def __init__(self, model: TextToImage) -> None:
        self.model = model
        self.tokenizer, self.encoder = model.pipe.tokenizer, model.pipe.text_encoder
        self.length = prompt_length(self.tokenizer, self.encoder.config)
        self.usable = torch.tensor(usable_ids(self.tokenizer), device=model.device)
        self.table: Tensor = self.encoder.get_input_embeddings().weight[self.usable].detach().float()

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, without both ends."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def text(self, ids: Sequence[int]) -> str:
        """The plain text of these tokens; it is this that is judged, and it may have other tokens."""
        text = str(self.tokenizer.decode(ids)).strip()
        tidy = text.replace(" ,", ",")
        return tidy if self.ids(tidy) == list(ids) else text

    def framed(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Input ids (B, L) of tokens without ends, which must fit."""
        begin, end, fill = (getattr(self.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad"))
        rows = [[begin, *tokens, end] + [fill] * (self.length - len(tokens) - 2) for tokens in prompts]
        return torch.tensor(rows, device=self.model.device)

    def encoded(self, ids: Tensor, soft: Tensor | None = None, where: Tensor | None = None) -> Any:
        """What the text encoder returns for ids (B, L), with its own embeddings, or with those of `soft` (B, L, D)
        at the places `where` (B, L). Differentiable in `soft`."""
        mask = None
        if getattr(self.encoder.config, "use_attention_mask", False):
            ends = (ids == self.tokenizer.eos_token_id).int().cumsum(dim=1)
            mask = ((ends == 0) | ((ends == 1) & (ids == self.tokenizer.eos_token_id))).long()
        with replaced(self.encoder, soft, where):
            return self.encoder(ids, attention_mask=mask)

    @torch.no_grad()
    def embedded(self, prompts: Sequence[Sequence[int]], pooled: bool = False) -> Tensor:
        """Text embeddings (n, L, D) of tokens without ends, or what the encoder pools of them (n, D); float32."""
        parts = [self.encoded(self.framed(prompts[i : i + AT_ONCE])) for i in range(0, len(prompts), AT_ONCE)]
        return torch.cat([(part.pooler_output if pooled else part[0]).float() for part in parts])

    def embeddings(self, ids: Tensor, soft: Tensor | None = None, where: Tensor | None = None) -> Tensor:
        """Text embeddings (B, L, D), as `TextToImage.encode` has them of a prompt; arguments as in `encoded`."""
        return self.encoded(ids, soft, where)[0].to(self.model.dtype)


def check_room(name: str, k: int, terms: Terms) -> None:
    """Raises UserError if k tokens in a prompt's place are more than a prompt has."""
    if k > terms.length:
        raise UserError(f"attack {name}: k is at most {terms.length} tokens of this model, not {k}")


@contextmanager
def replaced(encoder: Any, soft: Tensor | None, where: Tensor | None) -> Iterator[None]:
    """In here the token embeddings are those of `soft` (B, L, D) where `where` (B, L) says so: a hook on the input
    embedding layer, which all versions of transformers have; positions, mask and pooling stay the encoder's own."""
    if soft is None or where is None:
        yield
        return
    there, put = where.unsqueeze(-1), soft

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return torch.where(there, put.to(output.dtype), output)

    handle = encoder.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def usable_ids(tokenizer: Any) -> list[int]:
    """See `Words.usable`."""
    from unpaint.picturebook.tokenizer import UNKNOWN, unused_ids

    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    again = tokenizer(texts, add_special_tokens=False).input_ids
    left_out = set(tokenizer.all_special_ids)
    if UNKNOWN in tokenizer.get_vocab():
        left_out |= set(unused_ids(tokenizer))
    return [i for i, ids in enumerate(again) if list(ids) == [i] and i not in left_out]


@dataclass(frozen=True)
class Layout:
    """A prompt with free places: its tokens without ends, and which of them are free (positions among the tokens)."""

    tokens: list[int]
    free: list[int]

    def filled(self, ids: Sequence[int]) -> list[int]:
        """The tokens with these (len(free),) in the free places."""
        tokens = list(self.tokens)
        for place, token in zip(self.free, ids, strict=True):
            tokens[place] = token
        return tokens


def layout(tokens: Sequence[int], slots: str, k: int, most: int, filler: int) -> Layout:
    """Free places in a prompt of these tokens: k before it (prefix) or after it (suffix), one after every k of its
    tokens (every), or k instead of it (replace). `filler` stands in the free places for the moment.

    At most `most` tokens fit: the prompt's own end is cut for it. Raises UserError if there is no room for the free
    ones, or no free place in so short a prompt.
    """
    for kept in range(len(tokens), -1, -1):
        found = _layout(tokens[:kept], slots, k, filler)
        if len(found.tokens) <= most:
            break
    else:
        raise UserError(f"{k} free tokens do not fit into a prompt: the model takes {most}")
    if not found.free:
        raise UserError(f"a prompt of {len(tokens)} tokens has no free place with one after every {k}")
    return found


def _layout(tokens: Sequence[int], slots: str, k: int, filler: int) -> Layout:
    own = list(tokens)
    match slots:
        case "prefix":
            return Layout([filler] * k + own, list(range(k)))
        case "suffix":
            return Layout(own + [filler] * k, list(range(len(own), len(own) + k)))
        case "replace":
            return Layout([filler] * k, list(range(k)))
        case "every":
            mixed: list[int] = []
            for i, token in enumerate(own):
                mixed += [token, filler] if i % k == k - 1 else [token]
            return Layout(mixed, list(range(k, len(mixed), k + 1)))
    raise UserError(f"slots is {', '.join(SLOTS)}, not '{slots}'{nearest(slots, SLOTS)}")


def by_text_alone(
    scene: Scene, search: Callable[[Sequence[int]], Iterator[Sequence[str] | None]]
) -> Iterator[Try | None]:
    """The attempts of an attack that looks at the text encoder only: what it finds does not depend on the edit, and is
    kept beside the unedited model's outcomes. `search(rows)` yields None now and then, and in the end the rows' texts.
    """
    files = {row: scene.shared / "texts" / f"{digest_of(scene.cases[row])}.json" for row in scene.open}
    found: dict[int, str] = {}
    for row, file in files.items():
        try:
            found[row] = str(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    missing = [row for row in scene.open if row not in found]
    for texts in search(missing) if missing else ():
        if texts is None:
            yield None
            continue
        for row, text in zip(missing, texts, strict=True):
            found[row] = text
            write_json(files[row], text)
    rows = list(scene.open)
    yield scene.painted(rows, [found[row] for row in rows])
