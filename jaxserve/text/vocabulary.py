"""Vocabularies of other formats as `tokenizers` ones: SentencePiece model files and what GGUF files say of theirs.

Runs no code of a checkpoint.
"""

import logging
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

log = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece and GGUF number them alike
SPACE = "▁"  # how SentencePiece writes a space
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class SentencePiece:
    """A SentencePiece model: pieces (id -> text, score, type), how it splits, and how it prepares a text."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    unigram: bool = False
    space_prefix: bool = True  # a text starts as if a space stood before it
    collapse_spaces: bool = False
    character_map: bytes = b""  # SentencePiece's compiled normalization, empty for none


def read_sentencepiece(data: bytes, name: str = "tokenizer.model") -> SentencePiece:
    """Reads the bytes of a `tokenizer.model`; ValueError, with `name`, for anything else."""
    try:
        return _read_sentencepiece(data)
    except (IndexError, struct.error, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{name} is not a SentencePiece model: {error}") from None


def _read_sentencepiece(data: bytes) -> SentencePiece:
    pieces, scores, types = [], [], []
    trainer: dict = {}
    normalizer: dict = {}
    for number, value in _protobuf(data):  # field numbers: sentencepiece_model.proto
        if number == 1:
            piece = dict(_protobuf(value))
            pieces.append(piece[1].decode() if 1 in piece else "")
            scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
            types.append(piece.get(3, NORMAL))
        elif number == 2:
            trainer = dict(_protobuf(value))
        elif number == 3:
            normalizer = dict(_protobuf(value))
    if not pieces:
        raise IndexError("no pieces in it")
    kind = trainer.get(3, 1)
    if kind not in (1, 2) or trainer.get(24, 0):
        raise TypeError("only BPE and unigram models with spaces in front of words are supported")
    return SentencePiece(
        pieces,
        scores,
        types,
        unigram=kind == 1,
        space_prefix=bool(normalizer.get(3, 1)),
        collapse_spaces=bool(normalizer.get(4, 1)),
        character_map=normalizer.get(2, b""),
    )


def _protobuf(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: number and value (an integer, or bytes still to be read)."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise IndexError(f"a field of wire type {kind}")
        if at + size > end:
            raise IndexError("it ends in the middle of a field")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = data[at]
    at += 1
    if value < 128:
        return value, at
    value, shift = value & 127, 7
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def from_sentencepiece(
    model: SentencePiece, added: dict[int, AddedToken] | None = None, prefix_once: bool = False
) -> tokenizers.Tokenizer:
    """A SentencePiece model, with `added` tokens put over the pieces of their ids.

    The text between two special tokens starts with a space of its own (where the model has that), as in Llama's and
    InternLM2's tokenizers; with `prefix_once` only the start of the whole text does (transformers' `legacy=False`).
    """
    added = dict(added or {})
    for id, (text, kind) in enumerate(zip(model.pieces, model.types, strict=True)):
        if kind in (CONTROL, UNKNOWN, USER_DEFINED) and text:
            added.setdefault(id, AddedToken(text, special=kind != USER_DEFINED, normalized=False))
    texts = list(model.pieces)
    for id, token in sorted(added.items()):
        if id > len(texts):
            raise ValueError(
                f"the added token {token.content!r} has id {id}; ids {len(texts)} to {id - 1} have no token"
            )
        texts[id : id + 1] = [token.content]
    vocabulary = {text: id for id, text in enumerate(texts)}
    unknown = model.types.index(UNKNOWN) if UNKNOWN in model.types else None
    fallback = model.types.count(BYTE) == 256
    if model.unigram:
        scores = model.scores + [0.0] * (len(texts) - len(model.scores))
        tokenizer = tokenizers.Tokenizer(models.Unigram(list(zip(texts, scores, strict=True)), unknown, fallback))
    else:
        name = None if unknown is None else texts[unknown]
        merges = _merges(model, texts)
        tokenizer = tokenizers.Tokenizer(
            models.BPE(vocabulary, merges, unk_token=name, fuse_unk=True, byte_fallback=fallback)
        )
    once = prefix_once and model.space_prefix
    tokenizer.normalizer = _normalizer(model, prefix=model.space_prefix and not once)
    if once:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * model.space_prefix)
    add(tokenizer, added)
    return tokenizer


def _normalizer(model: SentencePiece, prefix: bool):
    steps: list = []
    if model.character_map:
        steps.append(normalizers.Precompiled(model.character_map))
    if model.collapse_spaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _merges(model: SentencePiece, texts: list[str]) -> list[tuple[str, str]]:
    """The merges that a BPE model leaves unsaid: every way to put a piece together of two, best piece first.

    texts: what stands in the vocabulary; a piece that was replaced there is no part of a merge.
    """
    ids = {
        text: id
        for id, (text, kind) in enumerate(zip(model.pieces, model.types, strict=True))
        if kind in (NORMAL, USER_DEFINED, UNUSED) and text == texts[id]
    }
    found = []
    for text, id in ids.items():
        score = -model.scores[id]
        for cut in range(1, len(text)):
            left = ids.get(text[:cut])
            if left is not None:
                right = ids.get(text[cut:])
                if right is not None:
                    found.append((score, id, left, right))
    found.sort()
    return [(model.pieces[left], model.pieces[right]) for _, _, left, right in found]


def add(tokenizer: tokenizers.Tokenizer, added: dict[int, AddedToken]) -> None:
    """Adds tokens at their ids; those that are there already stay.  ValueError where an id is taken."""
    present = tokenizer.get_added_tokens_decoder()
    missing = {id: token for id, token in sorted(added.items()) if id not in present}
    tokenizer.add_tokens(list(missing.values()))
    for id, token in missing.items():
        if (found := tokenizer.token_to_id(token.content)) != id:
            raise ValueError(
                f"the added token {token.content!r} should have id {id}, but the vocabulary makes it {found}"
            )


# How byte-level vocabularies split a text before merging, by llama.cpp's names.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {"llama-bpe": _WORDS % "{1,3}", "qwen2": _WORDS % "", "tekken": _TEKKEN}
_SAME = {
    "gpt2": "gpt-2",
    "default": "gpt-2",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
}


def from_gguf(data: dict) -> tokenizers.Tokenizer:
    """The tokenizer of a GGUF file, from `jaxserve.checkpoint.gguf.tokenizer_data`."""
    if data["model"] == "llama":
        return from_sentencepiece(
            SentencePiece(data["tokens"], data["scores"], data["token_types"], space_prefix=data["add_space_prefix"])
        )
    if data["model"] != "gpt2":
        raise ValueError(f"GGUF tokenizers of the kind 'gpt2' and 'llama' are supported, not {data['model']!r}")
    name = _SAME.get(data["pre"], data["pre"])
    if data["pre"] == "default":
        log.warning("the GGUF file does not name its pre-tokenizer: GPT-2's is used, which may not be the model's")
    merges = [tuple(merge.split(" ", 1)) for merge in data["merges"]]
    vocabulary = {text: id for id, text in enumerate(data["tokens"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name in ("llama-bpe", "tekken")))
    if name in ("gpt-2", "smollm"):
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = [pre_tokenizers.Digits(individual_digits=True)] * (name == "smollm")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, words])
    elif name in _PATTERNS:
        split = pre_tokenizers.Split(Regex(_PATTERNS[name]), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
        if name == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
    else:
        known = ", ".join(sorted({"gpt-2", "smollm", *_PATTERNS, *_SAME}))
        raise ValueError(
            f"the pre-tokenizer {data['pre']!r} of this GGUF file is not supported ({known} are); "
            "use the model's Hugging Face folder"
        )
    tokenizer.decoder = decoders.ByteLevel()
    add(
        tokenizer,
        {
            id: AddedToken(text, special=kind != USER_DEFINED, normalized=False)
            for id, (text, kind) in enumerate(zip(data["tokens"], data["token_types"], strict=True))
            if kind in (CONTROL, UNKNOWN, USER_DEFINED) and text
        },
    )
    return tokenizer
