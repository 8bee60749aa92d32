"""Tokenizers: text to token ids, ids to text, and `TextStream`, which prints a reply while its ids come in.

A tokenizer comes from a Hugging Face folder or from what a GGUF file says of its own; no code of a checkpoint is run.
"""

import codecs
import functools
import json
from collections.abc import Iterable, Sequence

import tokenizers

from jaxserve.text import source, vocabulary


def _byte_characters() -> dict[int, int]:
    """GPT-2's way to write bytes as printable characters, turned round: character -> byte (both as numbers)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    unmapped = dict.fromkeys(others, 0xFFFF)  # a token with such a character is no byte-level text
    return unmapped | {byte: byte for byte in printable} | {256 + n: byte for n, byte in enumerate(others)}


BYTE_CHARACTERS = _byte_characters()


class Tokenizer:
    """Token ids of a text and the text of token ids.  Never changes after loading: threads may share it.

    bos_ids: what `encode` puts first, () for most.  bos_id, eos_id: the tokens of that name, or None.
    eos_ids: every id that ends a reply.  special_ids: ids that `decode` leaves out.
    named: "bos_token" and the like -> text.  templates: chat templates (jinja) by name.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        named: dict[str, str] | None = None,
        bos_ids: Sequence[int] = (),
        eos_ids: Iterable[int] = (),
        templates: dict[str, str] | None = None,
    ):
        self.core = core
        self.named = dict(named or {})
        self.templates = dict(templates or {})
        self.bos_id = self.id_of(self.named.get("bos_token"))
        self.eos_id = self.id_of(self.named.get("eos_token"))
        self.bos_ids = tuple(bos_ids)
        self.eos_ids = frozenset([*eos_ids, *source.ids(self.eos_id)])
        self._added = core.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in self._added.items() if token.special)
        self._style = _Style(core)

    @classmethod
    def load(cls, model) -> "Tokenizer":
        """The tokenizer of a model folder or an open checkpoint; ValueError, naming the file, if it has none."""
        return cls(**source.read(model))

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's chat template (jinja), None if it has none."""
        return self.templates.get("default")

    @property
    def vocab_size(self) -> int:
        """One more than the highest id that has a token; a model's logits may be wider."""
        return len(self.token_bytes)

    def id_of(self, token: str | None) -> int | None:
        """The id of a token given as it stands in the vocabulary, None if there is no such token."""
        return None if token is None else self.core.token_to_id(token)

    def encode(self, text: str, bos: bool = True, special: bool = True) -> list[int]:
        """Token ids of `text`.  bos: begin as the model wants a text to begin.  special=False: "<s>" is plain text."""
        core = self.core if special else self._literal
        try:
            # unlike encode, this leaves the interpreter to other threads while it works
            ids = core.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError:
            raise ValueError(_unencodable(text)) from None
        return [*self.bos_ids, *ids] if bos else ids

    def spell(self, text: str) -> list[int]:
        """Token ids that print `text` in the middle of a text; "<s>" is plain text."""
        if self._style.spaces:  # below the normalizer, which would put a space before it
            return [token.id for token in self.core.model.tokenize(text.replace(" ", vocabulary.SPACE))]
        ids = self.encode(text, bos=False)
        return ids if self.special_ids.isdisjoint(ids) else self.encode(text, bos=False, special=False)

    def decode(self, ids: Iterable[int], skip_special: bool = True, continues: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids without a token nothing.

        A vocabulary that writes a space before the first word of a text loses it here; with `continues` there is
        text before these ids, and the space stays.
        """
        table, size, skip = self.token_bytes, len(self.token_bytes), self.special_ids if skip_special else ()
        text = b"".join(table[id] for id in ids if id < size and id not in skip).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_space and not continues else text

    @property
    def strips_space(self) -> bool:
        """Whether the space before the first word of a text is the vocabulary's and not the text's."""
        return self._style.strip

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """id -> the bytes that it prints (special tokens: their names); b"" for ids without a token."""
        words = self.core.get_vocab(with_added_tokens=True)
        table = [b""] * (max(words.values(), default=-1) + 1)
        for word, id in words.items():
            table[id] = self._style.bytes(word)
        for id, token in self._added.items():
            table[id] = token.content.encode()
        return table

    @functools.cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        core = tokenizers.Tokenizer.from_str(self.core.to_str())
        core.encode_special_tokens = True
        return core

    def split_stops(self, words: Iterable[str]) -> tuple[frozenset[int], tuple[str, ...]]:
        """Stop words as ids, where they are special or added tokens, and as texts for `TextStream`, where not."""
        ids = {token.content: id for id, token in self._added.items()}
        words = list(dict.fromkeys(words))
        return frozenset(ids[word] for word in words if word in ids), tuple(word for word in words if word not in ids)

    def word_ids(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Token id sequences that spell `words` (bad words), each at the start of a text or line and after a space."""
        added = {token.content: id for id, token in self._added.items()}
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            if word in added:
                found[(added[word],)] = None
                continue
            bare = word.removeprefix(" ") or word
            for text in (bare, " " + bare):
                ids = self.spell(text)
                if ids:
                    found[tuple(ids)] = None
        return tuple(found)


class _Style:
    """How a vocabulary writes bytes: GPT-2's characters, or SentencePiece's "▁" and "<0x0A>".  Read off its decoder."""

    def __init__(self, core: tokenizers.Tokenizer):
        spec: dict = json.loads(core.decoder.__getstate__()) if core.decoder else {"type": None}
        steps: list[dict] = spec["decoders"] if spec["type"] == "Sequence" else [spec]
        kinds = {step["type"]: step for step in steps}
        self.byte_level = "ByteLevel" in kinds
        self.spaces = "Metaspace" in kinds or any(
            step["type"] == "Replace" and step["pattern"] == {"String": vocabulary.SPACE} for step in steps
        )
        if not self.byte_level and not self.spaces:
            raise ValueError(f"only byte-level and SentencePiece vocabularies are supported; this decodes by {spec}")
        self.byte_pieces = "ByteFallback" in kinds
        prepends = kinds.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
        strip = kinds.get("Strip", {})
        self.strip = not self.byte_level and (prepends or (strip.get("content"), strip.get("start")) == (" ", 1))

    def bytes(self, word: str) -> bytes:
        if self.byte_level:
            try:
                return word.translate(BYTE_CHARACTERS).encode("latin-1")
            except UnicodeEncodeError:  # a token that was added as plain text
                return word.encode()
        if self.byte_pieces and vocabulary.BYTE_PIECE.fullmatch(word):
            return bytes([int(word[3:5], 16)])
        return word.replace(vocabulary.SPACE, " ").encode()


class TextStream:
    """The text of one reply while its ids come in: whole characters only, and nothing from a stop string on.

    All that `push` and `finish` return, joined, is `Tokenizer.decode` of all ids, cut at the stop string that is
    complete first (of those that end there, the longest).  Held back is only an unfinished character, or an end of the
    text that may still become a stop string.  A token costs the same however long the reply is.

    include_stop: the stop string itself is printed.  continues: as in `Tokenizer.decode`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Iterable[str] = (),
        skip_special: bool = True,
        include_stop: bool = False,
        continues: bool = False,
    ):
        self.stopped = False
        self._table = tokenizer.token_bytes
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.strips_space and not continues
        self._stops = [_Stop(word) for word in dict.fromkeys(stop)]
        self._firsts = {stop.text[0] for stop in self._stops}
        self._include_stop = include_stop
        self._held = ""

    def push(self, token: int) -> str:
        """What can be printed once `token` is there."""
        if self.stopped or token in self._skip or token >= len(self._table):
            return ""
        return self._print(self._decoder.decode(self._table[token]))

    def finish(self) -> str:
        """What is left when no more tokens come."""
        text = self._print(self._decoder.decode(b"", True))
        held, self._held = self._held, ""
        return text + held

    def _print(self, text: str) -> str:
        if not text or self.stopped:
            return ""
        if self._strip:
            self._strip = False
            text = text.removeprefix(" ")
        if not self._held and self._firsts.isdisjoint(text):  # no stop string begins here
            return text
        start = len(self._held)
        self._held += text
        for end, character in enumerate(text, start + 1):
            complete = max(stop.advance(character) for stop in self._stops)
            if complete:
                self.stopped = True
                text, self._held = self._held[: end if self._include_stop else end - complete], ""
                return text
        keep = max(stop.matched for stop in self._stops)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text


class _Stop:
    """One stop string; `matched` of its characters are the end of the text so far (Knuth, Morris, Pratt)."""

    def __init__(self, text: str):
        if not text:
            raise ValueError("a stop string is empty")
        self.text = text
        self.matched = 0
        self.shorter = [0, 0]  # matched -> the next shorter beginning that the text could also end with
        matched = 0
        for character in text[1:]:
            while matched and text[matched] != character:
                matched = self.shorter[matched]
            matched += text[matched] == character
            self.shorter.append(matched)

    def advance(self, character: str) -> int:
        """Takes one more character of the text; the stop string's length once it is complete, else 0."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self.shorter[self.matched]
        self.matched += self.text[self.matched] == character
        return len(self.text) if self.matched == len(self.text) else 0


def stop_ids(tokenizer: Tokenizer, generation_config: dict, template=None) -> frozenset[int]:
    """Ids that end a reply: of the tokenizer, the generation config, and the chat template's stop words."""
    words = tokenizer.split_stops(template.stop_words)[0] if template else frozenset()
    return tokenizer.eos_ids | words | frozenset(source.ids(generation_config.get("eos_token_id")))


def stop_strings(tokenizer: Tokenizer, template=None) -> tuple[str, ...]:
    """The chat template's stop words that are no tokens, for `TextStream`."""
    return tokenizer.split_stops(template.stop_words)[1] if template else ()


def _unencodable(text) -> str:
    if not isinstance(text, str):
        return f"a text is expected, not {type(text).__name__}"
    at = next((n for n, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
    return f"the text is no Unicode: at character {at} is half of a surrogate pair"
