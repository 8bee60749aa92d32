"""What a client may ask the shape of an answer to be, as llguidance's grammars: JSON schemas, regexes, choices, Lark.

A grammar travels as llguidance's JSON text: made here from a request, checked here before the request is queued, and
compiled again (`matcher`) where tokens are drawn.  Grammars come from clients, so everything about them is bounded: how
long their text is, how deep they nest, and the work that llguidance may put into them.
"""

import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark

from jaxserve.text import schema as schemas
from jaxserve.text.tokenizer import Tokenizer

log = logging.getLogger("jaxserve")
LONGEST = 1 << 18  # characters of a grammar as JSON text
LONGEST_REGEX = 1 << 14  # characters
LONGEST_GRAMMAR = 1 << 14  # characters of Lark or GBNF
MOST_RULES = 200  # of Lark or GBNF; llguidance follows a chain of rules on the C stack
MOST_OPERATORS = 8  # "&" and "~" of Lark; each may double the work
MOST_CHOICES = 10_000
MOST_SECONDS = 0.25  # of the processor, to compile a grammar and its first mask
MOST_SPELLED = 4096  # texts whose tokens are remembered, of at most LONGEST_SPELLED bytes
LONGEST_SPELLED = 64
MOST_CHECKED = 4096  # grammars whose check is remembered; about 200 bytes each

# One space, or a new line with its indentation: models write JSON either way, and none can go on with blanks for ever.
WHITESPACE = r" |\n[ \t]{0,16}"

# A tenth to a half of llguidance's own limits.  A matcher's lexer holds 1 to 2 KB a state.
LIMITS = LLParserLimits(
    initial_lexer_fuel=300_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=50_000,
    verbose_errors=False,
)


def token_table(tokenizer: Tokenizer, vocab: int | None = None, stop_ids: Iterable[int] = ()) -> LLTokenizer:
    """The tokenizer as llguidance wants it; made once for a model, in 0.2 s to 1 s.

    vocab: the width of the model's logits, and so of a mask, where it is more than the tokenizer's.  stop_ids: what
    ends an answer, beside the tokenizer's own.  Special tokens and those that end an answer are no text for a grammar.
    """
    ends = sorted({*tokenizer.eos_ids, *stop_ids})
    if not ends:
        raise ValueError("the tokenizer names no token that ends an answer, so grammars cannot be followed")
    width = max(vocab or 0, tokenizer.vocab_size)
    table = _native(tokenizer, width, ends)
    if table is None:
        spelling = _Spelling(tokenizer, width, ends)
        table = spelling.table = LLTokenizer(TokenizerWrapper(spelling), eos_token=ends)
    return table


def _native(tokenizer: Tokenizer, vocab: int, ends: list[int]) -> LLTokenizer | None:
    """The table as llguidance makes it from the tokenizer's file; None where it reads that otherwise than we do.

    It spells texts without the interpreter, for which the threads that fill masks would wait.
    """
    try:
        table = LLTokenizer(tokenizer.core.to_str(), n_vocab=vocab, eos_token=ends)
    except BaseException as error:  # a panic of Rust code is no Exception
        log.debug("llguidance does not read the tokenizer: %s", error)
        return None
    special = tokenizer.special_ids.union(ends)
    for id, text in enumerate(tokenizer.token_bytes):
        if text == b"\xff":  # in no text; llguidance marks special tokens with it
            continue
        if table.is_special_token(id) != (id in special) or (id not in special and table.decode_bytes([id]) != text):
            log.debug("llguidance takes token %d, %r, for another", id, text)
            return None
    return table


class _Spelling:
    """The tokens of a text that a grammar leaves no choice about.  llguidance calls it: nothing may be raised here."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, ends: list[int]):
        self.eos_token_id = ends[0]
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [*tokenizer.token_bytes, *[b""] * (vocab - tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids.union(ends))
        self.table: LLTokenizer | None = None
        self._tokenizer = tokenizer
        self._known: dict[bytes, list[int]] = {}  # a schema forces the same texts again and again

    def __call__(self, text: str | bytes) -> list[int]:
        spelled = text.encode() if isinstance(text, str) else text
        if self.table is None:  # llguidance tries whether bytes can be given
            return []
        known = self._known.get(spelled)
        if known is not None:
            return known
        try:
            ids = self._tokenizer.spell(spelled.decode())
        except Exception:
            ids = []
        if b"".join(self.tokens[id] for id in ids) != spelled:
            ids = self.table.greedy_tokenize(spelled.decode("utf-8", "replace"))
        if len(spelled) <= LONGEST_SPELLED:
            if len(self._known) >= MOST_SPELLED:
                self._known.clear()
            self._known[spelled] = ids
        return ids


def matcher(grammar: str, table: LLTokenizer) -> LLMatcher:
    """A fresh matcher for one answer; its `is_error()` is to be asked.  Takes 1 ms, at most about `MOST_SECONDS`."""
    return LLMatcher(table, grammar, log_level=0, limits=LIMITS)


def check(grammar: str, table: LLTokenizer) -> None:
    """ValueError with the reason, in at most 300 characters, where `grammar` cannot be followed.

    What was checked is remembered, so that a grammar sent with every request costs once.
    """
    tokens = f"{table.vocab_size} {table.eos_tokens} "
    key = hashlib.sha256((tokens + grammar).encode("utf-8", "surrogatepass")).digest()
    # No lock: gevent's, which a lock is in a web process, loses a thread of the pool now and then.  Each of these steps
    # is one for the interpreter.
    try:
        _checked.move_to_end(key)
        fault = _checked[key]
    except KeyError:
        fault = _checked[key] = _fault(grammar, table)
        while len(_checked) > MOST_CHECKED:
            _checked.popitem(last=False)
    if fault:
        raise ValueError(fault)


_checked: OrderedDict[bytes, str | None] = OrderedDict()


def _fault(grammar: str, table: LLTokenizer) -> str | None:
    if len(grammar) > LONGEST:
        return f"the grammar is {len(grammar)} characters long; {LONGEST} is the most"
    started = time.thread_time()
    made = matcher(grammar, table)
    if not made.is_error():
        made.compute_bitmask()
    seconds = time.thread_time() - started
    if made.is_error():
        return f"the grammar cannot be used: {_reason(made.get_error())}"[:300]
    if seconds > MOST_SECONDS:
        return f"the grammar takes {seconds:.1f} s to compile; {MOST_SECONDS} s is the most"
    return None


def _reason(message: str) -> str:
    """llguidance's message in one short line."""
    if message.startswith("NoExtension"):
        return "no text fits it"
    lines = [line.strip() for line in message.splitlines()]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return reason if len(reason) <= 240 else reason[:237] + "..."


# --- from requests


TYPES = ("text", "json_object", "json_schema", "regex_schema", "regex", "grammar")


def from_response_format(format: dict | None) -> str | None:
    """OpenAI's response_format (chat's or that of responses), LMDeploy's regex_schema; None where any text will do.

    ValueError names what is wrong.  JSON schemas that are not strict may hold keywords that are not enforced.
    """
    if format is None:
        return None
    kind = format.get("type") if isinstance(format, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        schema = format.get("schema")
        return from_schema({"type": "object"} if schema is None else schema)
    if kind == "json_schema":
        given = format.get("json_schema", format if "schema" in format else None)
        if not isinstance(given, dict):
            raise ValueError("response_format: json_schema is an object with name and schema")
        schema = given.get("schema")
        return from_schema({"type": "object"} if schema is None else schema, strict=given.get("strict") is True)
    if kind in ("regex_schema", "regex"):
        return from_regex(next((format[key] for key in (kind, "regex", "pattern") if key in format), None))
    if kind == "grammar":
        return from_lark(format.get("grammar"))
    raise ValueError(f"response_format: the type is {', '.join(TYPES[:-1])} or {TYPES[-1]}, not {_short(kind)}")


GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


def from_guided(**fields) -> str | None:
    """vLLM's spellings: structured_outputs, guided_json, guided_regex, guided_choice, guided_grammar.

    None without any; ValueError names what is wrong.
    """
    given = {name.removeprefix("guided_"): fields[name] for name in GUIDED if fields.get(name) is not None}
    outputs = fields.get("structured_outputs")
    if outputs is not None:
        if not isinstance(outputs, dict):
            raise ValueError("structured_outputs is an object with json, regex, choice or grammar")
        known = ("json", "regex", "choice", "grammar", "json_object")
        given |= {name: outputs[name] for name in known if outputs.get(name) not in (None, False)}
        if outputs.get("structural_tag") is not None:
            raise ValueError("structured_outputs: structural_tag is not supported; json, regex, choice, grammar are")
        if not any(name in outputs for name in known):
            raise ValueError(f"structured_outputs holds one of {', '.join(known)}, not {_short(list(outputs))}")
    if len(given) > 1:
        raise ValueError(f"only one of {', '.join(sorted(given))} can shape an answer")
    for name, value in given.items():
        if name == "json":
            return from_schema(_parsed(value) if isinstance(value, str) else value)
        if name == "json_object":
            return from_schema({"type": "object"})
        if name == "choice":
            return from_choice(value)
        return from_regex(value) if name == "regex" else from_lark(value)
    return None


def from_schema(schema: dict | bool, strict: bool = False) -> str:
    """Answers that are JSON as `schema` says.  strict: keywords that cannot be enforced are errors, else ignored."""
    return _json_text([{"json_schema": guided_schema(schema, strict)}])


def guided_schema(schema: dict | bool, strict: bool = False) -> dict:
    """A JSON schema as llguidance takes it, with how it writes JSON; for `from_schema` and for %json in Lark."""
    options = {"whitespace_pattern": WHITESPACE, "coerce_one_of": True, "lenient": not strict}
    return {**schemas.normalized(schema), "x-guidance": options}


def from_regex(regex: str | None) -> str:
    """Answers that `regex` (Rust's syntax) matches as a whole."""
    if not isinstance(regex, str) or not regex:
        raise ValueError(f"a regex is a text, not {_short(regex)}")
    if len(regex) > LONGEST_REGEX:
        raise ValueError(f"the regex is {len(regex)} characters long; {LONGEST_REGEX} is the most")
    return LLMatcher.grammar_from_regex(_unicode(regex))


def from_choice(choices: list[str]) -> str:
    """Answers that are one of `choices`."""
    if not isinstance(choices, list | tuple) or not choices:
        raise ValueError("a choice is a list of at least one text")
    if len(choices) > MOST_CHOICES:
        raise ValueError(f"there are {len(choices)} choices; {MOST_CHOICES} is the most")
    if wrong := [choice for choice in choices if not isinstance(choice, str | int | float)]:
        raise ValueError(f"a choice is a list of texts, not of {_short(wrong[0])}")
    return lark("start: CHOICE\nCHOICE: " + " | ".join(quoted(str(choice)) for choice in choices))


def from_lark(text: str | None) -> str:
    """Answers that a grammar describes, in llguidance's Lark, or in GBNF ("root ::= ...")."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"a grammar is a text in Lark or GBNF, not {_short(text)}")
    if len(text) > LONGEST_GRAMMAR:
        raise ValueError(f"the grammar is {len(text)} characters long; {LONGEST_GRAMMAR} is the most")
    starts = ("start:", "start :", "%llguidance")
    if "::=" in text and not any(line.lstrip().startswith(starts) for line in text.splitlines()):
        _few(text.count("::="))
        try:
            text = gbnf_to_lark(_unicode(text))
        except Exception as error:  # the library raises bare Exception, and RecursionError for nested groups
            reason = "it nests too deep" if isinstance(error, RecursionError) else str(error)
            raise ValueError(f"the grammar is no GBNF: {reason}"[:300]) from None
    _few(sum(1 for line in text.splitlines() if ":" in line))
    if text.count("&") + text.count("~") > MOST_OPERATORS:
        raise ValueError(f"a grammar has at most {MOST_OPERATORS} of & and ~")
    return lark(_unicode(text))


def _few(rules: int) -> None:
    if rules > MOST_RULES:
        raise ValueError(f"the grammar has {rules} rules; {MOST_RULES} is the most")


def lark(text: str, **others: str) -> str:
    """llguidance's JSON text for a Lark grammar that this package wrote.  others: grammars by name, for "@name"."""
    parts: list[dict] = [{"lark_grammar": text}]
    for name, other in others.items():
        first, *rest = json.loads(other)["grammars"]
        parts += [{**first, "name": name}, *rest]
    return _json_text(parts)


def quoted(text: str) -> str:
    """A text as a string of Lark."""
    return json.dumps(_unicode(text), ensure_ascii=False)


def special(text: str, tokenizer: Tokenizer) -> str:
    """A marker in a rule of Lark: its id where it is a special token, which no string matches, else a string."""
    id = tokenizer.id_of(text)
    return quoted(text) if id is None or id not in tokenizer.special_ids | tokenizer.eos_ids else f"<[{id}]>"


def _json_text(grammars: list[dict]) -> str:
    try:
        text = json.dumps({"grammars": grammars}, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise ValueError(schemas.TOO_DEEP) from None
    except (TypeError, ValueError):
        raise ValueError("the JSON schema holds something that is not JSON") from None
    return _unicode(text)


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the grammar is no Unicode: it holds half of a surrogate pair") from None
    return text


def _parsed(text: str):
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(schemas.TOO_DEEP) from None
    except ValueError:
        raise ValueError("guided_json: the text is not JSON") from None


def _short(value) -> str:
    return f"{value!r:.60}" if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
