"""Rows 23 to 35: texts that are hard to read, shapes and tools that are hard to make."""

import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.serve.faults.row import Case, Row, both, cases, fault, values
from tests.serve.faults.target import CHAT, COMPLETION, Target, events, many

# Texts ----------------------------------------------------------------------------------------------------------------


def long_texts(target: Target) -> Iterator[str | None]:
    for size in (50_000_000, 30_000_000, 4_000_000):
        text = "a" * size
        reply = target.chat(messages=[{"role": "user", "content": text}])
        yield fault(target, f"{size:,} letters in a chat", reply, 400, 413, within=1)
        reply = target.complete(prompt=text)
        yield fault(target, f"{size:,} letters to complete", reply, 400, 413, within=1)


STREAMS, GAP = 64, 0.1


def long_prompt(target: Target) -> Iterator[str | None]:
    """1.3 MB that fit, while others read their streams."""
    times: list[list[float]] = [[] for _ in range(STREAMS)]
    enough = threading.Event()

    def read(index):
        with target.open(prompt=f"Count from {index}.", max_tokens=4000, ignore_eos=True) as client:
            for _ in events(client):
                times[index].append(time.monotonic())
                if enough.is_set():
                    return

    readers = [threading.Thread(target=read, args=(i,), daemon=True) for i in range(STREAMS)]
    for reader in readers:
        reader.start()
    until = time.monotonic() + 60
    while not all(times) and time.monotonic() < until:
        time.sleep(0.05)
    replies = [target.complete(prompt="word " * 260_000, max_tokens=1) for _ in range(2)]
    enough.set()
    for reader in readers:
        reader.join(60)
    for reply in replies:
        yield fault(target, "1.3 MB", reply, 200, 400)
    gaps = sorted(b - a for line in times for a, b in itertools.pairwise(line))
    if len(gaps) < STREAMS:
        yield f"the {STREAMS} streams do not run"
        return
    target.took.append(gaps[int(0.99 * len(gaps))])
    if target.took[-1] > GAP * target.slack:
        yield f"the others' p99 between tokens was {1000 * target.took[-1]:.0f} ms"


ODD = ("\u0000", "\u202eשלום\u202c", "𝒳🙂", "👩‍👩‍👧‍👦", "é\u0301", "\ufeff\uffff", "\u2028")


def odd_letters(target: Target) -> Iterator[str | None]:
    half = json.dumps({"model": target.model, "messages": [{"role": "user", "content": "\ud800"}], "max_tokens": 1})
    yield fault(target, "half a surrogate pair", target.post(CHAT, half.encode()), 400, 200)
    bad = json.dumps({"model": target.model, "prompt": "X", "max_tokens": 1}).encode().replace(b"X", b"\xff\xfe")
    yield fault(target, "no UTF-8", target.post(COMPLETION, bad), 400)
    for text in ODD:
        body = {"messages": [{"role": "user", "content": text}], "stop": [text], "max_tokens": 12, "stream": True}
        reply = target.chat(**body)
        yield fault(target, repr(text), reply, 200, 400)
        try:
            reply.data.decode()
        except UnicodeDecodeError:
            yield f"{text!r}: the stream is no UTF-8"


# Shapes ---------------------------------------------------------------------------------------------------------------


def shape(schema) -> dict:
    """A body whose answer must fit a JSON schema."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def nested(depth: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _very_deep() -> bytes:
    """What json.dumps would not write."""
    depth = 100_000
    text = '{"properties":{"a":' * depth + "{}" + "}}" * depth
    return json.dumps({"messages": [{"role": "user", "content": "a"}], **shape("X")}).replace('"X"', text).encode()


LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
QUICK = {"statuses": (200, 400), "within": 0.1}


def schemas(target: Target) -> Iterator[str | None]:
    many(lambda _: target.chat(**shape({"type": "integer"})), 16)  # every process has made its tables
    yield from cases(
        Case("200 deep", shape(nested(200)), **QUICK),
        Case("100 000 deep", _very_deep, (400,), within=0.1),
        Case("5000 choices", shape({"enum": [f"choice {i}" for i in range(5000)]}), **QUICK),
        Case("a loop of references", shape(LOOP), **QUICK),
        Case("a reference to nothing", shape({"$ref": "#/$defs/none"}), **QUICK),
    )(target)
    with canary() as (port, called):
        for url in (f"http://127.0.0.1:{port}/schema.json", "file:///etc/passwd"):
            reply = target.chat(**shape({"$ref": url}))
            yield fault(target, "a reference elsewhere", reply, 200, 400, within=0.1)
        time.sleep(0.2)
        if called:
            yield "a schema's reference was followed over the network"


REGEXES = {
    "(a+)+b": "(a+)+b",
    "(a*)*": "(a*)*c",
    "repeats of repeats": "(x{1,1000}){1,1000}",
    "a lookahead": "(?=a)b",
    "a back-reference": r"(a)\1",
    "1 MB": "a" * (1 << 20),
    "1 MB of choices": "|".join(["ab"] * 350_000),
    "no regex": "(",
}


def regexes(target: Target) -> Iterator[str | None]:
    for name, regex in REGEXES.items():
        for way, body in (
            ("a schema's pattern", shape({"type": "string", "pattern": regex})),
            ("a regex", {"structured_outputs": {"regex": regex}}),
        ):
            yield fault(target, f"{way}, {name}", target.chat(**body), 200, 400, within=0.1)


DISTINCT = 10_000


def distinct(target: Target, count: int = DISTINCT) -> Iterator[str | None]:
    """So many schemas that no other request has: the memory of what was compiled is bounded."""

    def ask(index):
        enum = [f"{index} {i}" for i in range(20)]
        return target.chat(**shape({"enum": enum}), max_tokens=1)

    warm = many(ask, count // 10, 8)
    before = target.memory() if target.memory else 0
    replies = warm + many(lambda i: ask(i + count), count - count // 10, 8)
    yield next((fault(target, "a schema", reply, 200) for reply in replies if reply.status != 200), None)
    if target.memory and target.memory() > before + (48 << 20):
        yield f"memory grew by {target.memory() - before >> 20} MiB"


# What leaves no token: the only letters are banned, the end is too, or there is no text at all.
DEAD_ENDS = (
    Case("a schema that nothing fits", shape({"type": "integer", "minimum": 5, "maximum": 4}), (200, 400)),
    Case("a regex that nothing fits", {"structured_outputs": {"regex": r"[^\s\S]"}}, (200, 400)),
    Case(
        "an answer that may not end",
        {"structured_outputs": {"regex": "a"}, "min_tokens": 4, "max_tokens": 8},
        (200, 400),
    ),
    Case(
        "a choice without its letter",
        {"structured_outputs": {"choice": ["a"]}, "bad_words": ["a"]},
        (200, 400),
    ),
)


# Tools ----------------------------------------------------------------------------------------------------------------


def tool(name: str, **properties) -> dict:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": "does it", "parameters": parameters}}


def _many_tools() -> dict:
    return {"tools": [tool(f"tool_{i}", a={"type": "integer"}) for i in range(1000)]}


BOMB = tool("f", a={"type": "string", "pattern": "(x{1,1000}){1,1000}"})
TOOLS = (
    *(Case(f"a bomb, {choice}", {"tools": [BOMB], "tool_choice": choice}, **QUICK) for choice in ("auto", "required")),
    Case("1000 tools", _many_tools, (200, 400)),
    *(
        Case(f"a tool called {name!r:.20}", {"tools": [tool(name)]}, (200, 400))
        for name in ("a name", 'a"b', "", "x" * 10_000, "\n", "<|im_end|>", "__class__")
    ),
    Case("tools that are none", {"tools": [5]}),
    Case("a function without a name", {"tools": [{"type": "function", "function": {}}]}),
)
NAMED = {"type": "function", "function": {"name": "missing"}}
CHOICES = (
    Case("a tool that is not there", {"tools": [tool("f")], "tool_choice": NAMED}),
    Case("required, and no tools", {"tool_choice": "required"}),
    Case("named, and no tools", {"tool_choice": NAMED}),
    Case("no choice that there is", {"tools": [tool("f")], "tool_choice": "perhaps"}),
)


def templates(target: Target) -> Iterator[str | None]:
    plain = target.chat()
    yield fault(target, "without", plain, 200)
    bomb = "{{ 'x' * 10 ** 10 }}"
    for body in (
        {"chat_template": "{{ 'x' * 9000 }}"},
        {"chat_template": bomb},
        {"chat_template_kwargs": {"tokenize": True, "chat_template": bomb}},
        {"chat_template_kwargs": {"add_generation_prompt": False, "messages": []}},
        {"chat_template_kwargs": {"bos_token": "x" * 1000, "return_tensors": "pt"}},
    ):
        reply = target.chat(**body)
        yield fault(target, str(body)[:60], reply, 200, 400)
        if reply.status == 200 and reply.text != plain.text:
            yield f"{str(body)[:60]}: it was not ignored"


@contextmanager
def canary() -> Iterator[tuple[int, list]]:
    """A port of this machine at which nobody is to call, and the calls that came."""
    called: list = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def listen():
            try:
                while True:
                    client, address = listening.accept()
                    called.append(address)
                    client.close()
            except OSError:
                pass  # it is closed

        threading.Thread(target=listen, daemon=True).start()
        yield listening.getsockname()[1], called
        listening.shutdown(socket.SHUT_RDWR)


FORMATS = ({"type": "hiccup"}, {"type": 5}, 5, "json")
SCHEMAS = (123, "x", [1], {"type": "hiccup"}, {"properties": 5}, {"enum": 5})

ROWS = [
    Row(23, "50 MB of 'a' in one message", "400/413 in 1 s, not tokenized", long_texts),
    Row(
        24,
        "a legal prompt of 1.3 MB while 64 streams run",
        "p99 between their tokens < 100 ms",
        long_prompt,
        needs="room",
        tests=("text/test_tokenizer.py::test_a_long_text_leaves_the_interpreter_to_others",),
    ),
    Row(25, "half surrogates, U+0000, right-to-left, emoji in prompt and stop", "200/400, valid UTF-8", odd_letters),
    Row(26, "unknown model", "404", cases(*both("model", "nobody", "../etc", "x" * 10_000, statuses=(404,)))),
    Row(
        27,
        "unknown extra fields",
        "200",
        cases(*both("never_heard_of", 1, {"a": [None]}, statuses=(200,)), *both("user", "me", statuses=(200,))),
    ),
    Row(
        28,
        "response_format of an unknown type; schema 123; a type of JSON that is none",
        "400",
        cases(
            *values("response_format", *FORMATS),
            *(Case(f"schema {schema}", shape(schema)) for schema in SCHEMAS),
        ),
    ),
    Row(29, "JSON schema 200 / 100 000 deep, 5000 choices, loops, remote $ref", "400 or < 100 ms", schemas),
    Row(30, "regex (a+)+b, (x{1,1000}){1,1000}, lookahead, back-reference, 1 MB", "400 or < 100 ms", regexes),
    Row(
        31,
        "10 000 distinct schemas in a row",
        "memory flat",
        distinct,
        tests=("text/test_grammar.py::test_distinct_grammars_leave_memory_flat",),
    ),
    Row(
        32,
        "a grammar without a possible next token",
        "it ends or fails alone",
        cases(*DEAD_ENDS),
        tests=("engine/test_guided.py::test_a_grammar_that_allows_nothing_fails_its_row_only",),
    ),
    Row(33, "a tool with a bomb as its pattern, 1000 tools, odd names", "400 or works", cases(*TOOLS)),
    Row(34, "tool_choice names a missing tool; required without tools", "400", cases(*CHOICES)),
    Row(35, "chat_template, chat_template_kwargs from the client", "ignored or 400", templates),
]
