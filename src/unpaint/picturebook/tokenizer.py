"""Picturebook's tokenizer: CLIP's byte-level BPE with a small vocabulary of its own.

Merges are learned until each word of the language is one token. The vocabulary holds printable ASCII, so that any
other English word is spelled out; other bytes become `<|unknown|>`.
"""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from unpaint.picturebook.captions import corpus

MODEL_MAX_LENGTH = 24
MAX_VOCABULARY = 1000
BOS, EOS, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"

Pair = tuple[str, str]


def build(folder: Path) -> CLIPTokenizer:
    """Learns the tokenizer and saves it as a folder that `CLIPTokenizer.from_pretrained` loads; the same bytes always.

    The end token has the largest id, which is where CLIP's text tower pools; it also pads.
    """
    alphabet = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = sorted({word for text in corpus() for word in re.findall(r"[a-z]+|,", text)})
    merges = learn_merges(words)
    tokens = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet), *("".join(pair) for pair in merges)]
    tokens += [UNKNOWN, BOS, EOS]
    if len(tokens) > MAX_VOCABULARY or len(set(tokens)) < len(tokens):
        raise ValueError(f"{len(tokens)} tokens ({len(set(tokens))} different), at most {MAX_VOCABULARY} wanted")
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=list(merges),
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=MODEL_MAX_LENGTH,
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}) + "\n")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def learn_merges(words: list[str]) -> list[Pair]:
    """BPE merges, most frequent pair first and ties in alphabetical order, until each word is a single symbol.

    Written out because the order of tokens that `tokenizers`' trainer gives is not promised to be stable.
    """
    spelled = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[Pair] = []
    while True:
        counts = Counter(pair for symbols in spelled for pair in pairwise(symbols))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelled = [_merged(symbols, best) for symbols in spelled]


def _merged(symbols: list[str], pair: Pair) -> list[str]:
    out: list[str] = []
    for symbol in symbols:
        # `out[-1]` may itself be a merge of this round ("aa" + "a"); it is then longer than pair[0].
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def unused_ids(tokenizer: CLIPTokenizer) -> list[int]:
    """Ids that no text of the language has: pieces of words, symbols, `<|unknown|>`. Their embeddings are untrained."""
    used = {i for text in corpus() for i in tokenizer(text).input_ids}
    return [i for i in range(len(tokenizer)) if i not in used]
