"""Tokenizers of the real kinds, with vocabularies made from the captions: every word of the domain is one token."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPTokenizer, T5TokenizerFast

# Longer than any caption (19 tokens), so that a few positions after its end can gather what all of it says.
LENGTH = 24
# Of the third text encoder of Stable Diffusion 3, which joins its tokens to those of the other two.
THIRD_LENGTH = 20


def words_of(captions: list[str]) -> list[str]:
    """The words and signs of all captions, sorted."""
    return sorted({word for caption in captions for word in re.findall(r"\w+|[^\w\s]", caption)})


def merges_of(words: list[str]) -> list[tuple[str, str]]:
    """
    The merges that make each word one piece, most frequent pair first.

    Not by the trainer of `tokenizers`: among equally frequent pairs it takes now one, now another, and a run that goes
    on must number its pieces as before.
    """
    spelled = [(*word[:-1], f"{word[-1]}</w>") for word in words]
    merges = []
    while pairs := Counter(pair for pieces in spelled for pair in itertools.pairwise(pieces)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelled = [merged(pieces, best) for pieces in spelled]
    return merges


def merged(pieces: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The pieces of a word with every such pair joined."""
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return tuple(joined)


def write_clip(captions: list[str], folder: Path) -> None:
    """The files of a byte-level BPE of CLIP's kind."""
    merges = merges_of(words_of(captions))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The order of CLIP's own vocabulary: bytes, bytes at the end of a word, merged pieces, then the two marks.
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    settings = {"bos_token": "<|startoftext|>", "tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH}
    settings |= dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_t5(captions: list[str], folder: Path) -> None:
    """The files of a unigram tokenizer of T5's kind."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(f"▁{word}", -4.0) for word in words_of(captions) if word.isalpha()]
    pieces += [(letter, -8.0) for letter in letters]
    built = Tokenizer(models.Unigram(pieces, unk_id=2))
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Metaspace()
    built.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    built.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 0}
    settings |= {"tokenizer_class": "T5TokenizerFast", "model_max_length": LENGTH}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def make(model: str, captions: list[str], folder: Path) -> None:
    """Write the files of a model's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (write_clip if model == "sd" else write_t5)(captions, folder)


def load(model: str, folder: Path) -> Any:
    """Read a model's tokenizer."""
    return (CLIPTokenizer if model == "sd" else T5TokenizerFast).from_pretrained(folder)


def encode(tokenizer: Any, captions: list[str], length: int = LENGTH) -> Any:
    """Token numbers, N x `length`."""
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    return tokenizer(captions, **options).input_ids
