import json
import random
import re
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from jaxserve.text import grammar, schema
from jaxserve.text.tokenizer import Tokenizer
from tests.text.walk import accepts, allowed, walk

POINT = {"type": "object", "properties": {"x": {"type": "int"}, "name": {"type": "str"}}, "required": ["x", "name"]}
COMPACT, SPACED = '{"x":1,"name":"a"}', '{"x": 1, "name": "a"}'
PRETTY = '{\n  "x": 1,\n  "name": "a"\n}'


@pytest.fixture(scope="module", params=["smollm2", "spm"])
def model(request):
    tokenizer = request.getfixturevalue(request.param)
    return tokenizer, grammar.token_table(tokenizer, tokenizer.vocab_size + 37)


@pytest.fixture(scope="module")
def large(smollm2):
    return grammar.token_table(smollm2)


@pytest.fixture(scope="module")
def small(spm):
    return spm, grammar.token_table(spm)


# --- the tokenizer's side


def test_table(model):
    tokenizer, table = model
    assert table.vocab_size == tokenizer.vocab_size + 37 and table.eos_tokens == sorted(tokenizer.eos_ids)
    matcher = grammar.matcher(grammar.from_regex("(?s:.)*"), table)
    free = set(allowed(matcher))
    assert free & tokenizer.special_ids == set(table.eos_tokens)  # it may end, but no other special token is text
    assert max(free) < tokenizer.vocab_size
    written = {id for id, text in enumerate(tokenizer.token_bytes) if text.isascii() and text}
    assert written - tokenizer.special_ids <= free


def test_llguidance_reads_tokenizers_itself(model, monkeypatch):
    """Its table allows what one allows that asks us how texts are spelled, along answers with much that is forced."""
    tokenizer, table = model
    ends = sorted(tokenizer.eos_ids)
    assert grammar._native(tokenizer, table.vocab_size, ends) is not None
    monkeypatch.setattr(grammar, "_native", lambda *of: None)
    ours = grammar.token_table(tokenizer, table.vocab_size)
    for shape, text in (
        (grammar.from_schema(POINT | {"additionalProperties": False}), SPACED),
        (grammar.from_choice(["seventeen", "seventy seas"]), "seventy seas"),
        (grammar.from_regex("(the sea is deep and blue|a sea)\\.[0-9]{2}"), "the sea is deep and blue.17"),
    ):
        one, other = grammar.matcher(shape, table), grammar.matcher(shape, ours)
        for token in tokenizer.spell(text):
            assert allowed(one) == allowed(other)
            assert one.consume_token(token) == other.consume_token(token)
        assert allowed(one) == allowed(other)


def test_what_llguidance_reads_otherwise_is_spelled_by_us(spm):
    """A token of text that ends answers is no text for a grammar: llguidance does not know that from the file."""
    word = spm.encode("sea", bos=False)[-1]
    assert grammar._native(spm, spm.vocab_size, sorted({*spm.eos_ids, word})) is None


def test_all_that_end_an_answer_may(spm):
    other = spm.encode("sea", bos=False)[-1]
    table = grammar.token_table(spm, stop_ids=[other])
    assert table.eos_tokens == sorted({*spm.eos_ids, other})
    matcher = grammar.matcher(grammar.from_choice(["7"]), table)
    assert other not in allowed(matcher)
    assert matcher.consume_tokens(spm.spell("7")) and set(allowed(matcher)) == set(table.eos_tokens)


def test_a_tokenizer_without_an_end(spm):
    endless = Tokenizer(spm.core)
    assert not endless.eos_ids
    with pytest.raises(ValueError, match="no token that ends an answer"):
        grammar.token_table(endless)


def test_spelling(model):
    tokenizer, _ = model
    for text in ('{"name": "', " the sea", "naïve 你好", "<s>", "<|im_end|>", "  a\n\tb", ""):
        ids = tokenizer.spell(text)
        assert b"".join(tokenizer.token_bytes[id] for id in ids) == text.encode()
        assert tokenizer.special_ids.isdisjoint(ids)


# --- what requests say


@pytest.mark.parametrize(
    "format",
    [
        {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}},
        {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT, "strict": True}},
        {"type": "json_schema", "name": "point", "schema": POINT, "strict": True},
        {"type": "json_object", "schema": POINT},
    ],
)
def test_json_schema(model, format):
    made = grammar.from_response_format(format)
    assert "\n" not in made and json.loads(made)
    for good in (COMPACT, SPACED, PRETTY, '{ "x" : -12 , "name" : "\\n" }'):
        assert accepts(made, good, *model), good
    for bad in ('{"x":1}', '{"x":1.5,"name":"a"}', '{"x":1,"name":"a","more":1}', COMPACT + " ", "[]"):
        assert not accepts(made, bad, *model), bad


def test_json_object(model):
    for format in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "any"}}):
        made = grammar.from_response_format(format)
        assert accepts(made, '{"any": [1, {"b": null}], "c": ""}', *model)
        assert not accepts(made, "[1]", *model) and not accepts(made, "true", *model)


def test_no_shape():
    assert grammar.from_response_format(None) is None
    assert grammar.from_response_format({"type": "text"}) is None
    assert grammar.from_guided() is None
    assert grammar.from_guided(guided_json=None, structured_outputs={"regex": None}) is None


def test_blanks_end(small):
    """At most one space, or a line break with 16 blanks, wherever JSON may have some."""
    made = grammar.from_schema({"type": "array", "items": {"type": "integer"}})
    assert accepts(made, "[\n" + " " * 16 + "1 , 2\n]", *small)
    for bad in ("[  1]", "[\n\n1]", "[\n" + " " * 17 + "1]", " [1]"):
        assert not accepts(made, bad, *small), bad


def test_regex(model):
    for made in (
        grammar.from_response_format({"type": "regex_schema", "regex_schema": "call me [A-Z][a-z]{1,9}"}),
        grammar.from_guided(guided_regex="^call me [A-Z][a-z]{1,9}$"),
        grammar.from_guided(structured_outputs={"regex": "call me [A-Z][a-z]{1,9}"}),
    ):
        assert accepts(made, "call me Ishmael", *model) and not accepts(made, "call me ishmael", *model)


def test_choice(model):
    choices = ["yes", "no", 'a "b"\n/c/', "naïve 你好", "1"]
    for made in (
        grammar.from_guided(guided_choice=choices),
        grammar.from_guided(structured_outputs={"choice": choices}),
    ):
        assert all(accepts(made, choice, *model) for choice in choices)
        assert not accepts(made, "yesno", *model) and not accepts(made, "", *model)


@pytest.mark.parametrize("text", ['start: "x" digits+\ndigits: /[0-9]/', 'root ::= "x" digits+\ndigits ::= [0-9]'])
def test_grammar(model, text):
    for made in (
        grammar.from_guided(guided_grammar=text),
        grammar.from_guided(structured_outputs={"grammar": text}),
        grammar.from_response_format({"type": "grammar", "grammar": text}),
    ):
        assert accepts(made, "x123", *model) and not accepts(made, "x", *model)


def test_guided_json(model):
    for value in (POINT, json.dumps(POINT)):
        assert accepts(grammar.from_guided(guided_json=value), SPACED, *model)
        assert accepts(grammar.from_guided(structured_outputs={"json": value}), SPACED, *model)
    assert accepts(grammar.from_guided(structured_outputs={"json_object": True}), SPACED, *model)


@pytest.mark.parametrize(
    "format, reason",
    [
        ("text", "the type is text, json_object"),
        ({"type": "xml"}, "not 'xml'"),
        ({}, "not None"),
        ({"type": []}, "not a list"),
        ({"type": "json_schema", "json_schema": 3}, "json_schema is an object"),
        ({"type": "json_schema", "json_schema": {"schema": 123}}, "a JSON schema is an object, not 123"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "hiccup"}}}, "'hiccup' is no type; they are array"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": [1]}}}, "1 is no type"),
        ({"type": "json_schema", "json_schema": {"schema": {"properties": []}}}, "properties is an object"),
        ({"type": "json_schema", "json_schema": {"schema": {"anyOf": {}}}}, "anyOf is a list"),
        ({"type": "json_schema", "json_schema": {"schema": {"const": float("nan")}}}, "not JSON"),
        ({"type": "json_schema", "json_schema": {"schema": {"const": "\ud800"}}}, "half of a surrogate"),
        ({"type": "regex_schema"}, "a regex is a text, not None"),
        ({"type": "regex_schema", "regex_schema": "\ud800"}, "half of a surrogate"),
        ({"type": "grammar", "grammar": 5}, "Lark or GBNF, not 5"),
    ],
)
def test_formats_that_cannot_be_used(format, reason):
    with pytest.raises(ValueError, match=reason):
        grammar.from_response_format(format)


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"guided_json": "{"}, "the text is not JSON"),
        ({"guided_json": "[" * 100_000}, "nests too deep|not JSON"),
        ({"guided_choice": []}, "at least one text"),
        ({"guided_choice": [{}]}, "not of a dict"),
        ({"guided_choice": ["a"] * 10_001}, "10001 choices; 10000 is the most"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "only one of choice, regex"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "only one of json_object, regex"),
        ({"structured_outputs": []}, "structured_outputs is an object"),
        ({"structured_outputs": {"what": 1}}, "holds one of json, regex, choice, grammar, json_object, not"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structural_tag is not supported"),
        ({"guided_grammar": "root ::= ("}, "no GBNF"),
    ],
)
def test_what_cannot_guide(fields, reason):
    with pytest.raises(ValueError, match=reason):
        grammar.from_guided(**fields)


# --- schemas as people mean them


def test_types_of_other_languages(small):
    names = {"int": "1", "float": "1.5", "str": '"a"', "bool": "true", "None": "null", "List": "[1]", "DICT": '{"a":1}'}
    for name, good in names.items():
        made = grammar.from_schema({"type": name})
        assert accepts(made, good, *small), name
        assert not accepts(made, '"a"' if good != '"a"' else "1", *small), name
    assert accepts(grammar.from_schema({"type": ["int", "null"]}), "null", *small)
    assert accepts(grammar.from_schema({"type": "any"}), '{"a":[]}', *small)
    nullable = grammar.from_schema({"type": "string", "nullable": True})
    assert accepts(nullable, "null", *small) and accepts(nullable, '"a"', *small)


def test_a_property_may_be_called_type(small):
    made = grammar.from_schema({"properties": {"type": {"type": "int"}, "format": {"type": "str"}, "items": {}}})
    assert accepts(made, '{"type":1,"format":"x","items":[]}', *small) and not accepts(made, '{"type":"x"}', *small)


def test_objects_are_closed_where_that_is_meant(small):
    inner = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for given in ({"type": "array", "items": inner}, {"properties": {"x": inner}}):
        assert not accepts(grammar.from_schema(given), '[{"a":1,"b":2}]', *small)
        assert not accepts(grammar.from_schema(given), '{"x":{"b":2}}', *small)
    assert accepts(grammar.from_schema({**inner, "additionalProperties": True}), '{"a":1,"b":2}', *small)
    assert accepts(grammar.from_schema({"type": "object"}), '{"b":2}', *small)
    both = grammar.from_schema({"allOf": [inner, {"type": "object", "properties": {"b": {"type": "integer"}}}]})
    assert accepts(both, '{"a":1,"b":2}', *small)


def test_what_pydantic_writes(small):
    """References, defaults, titles, unions with a discriminator, optional fields, formats that are none."""
    given = {
        "$defs": {
            "Cat": {"properties": {"kind": {"const": "cat", "type": "string"}}, "required": ["kind"], "type": "object"},
            "Dog": {"properties": {"kind": {"const": "dog", "type": "string"}}, "required": ["kind"], "type": "object"},
        },
        "properties": {
            "pet": {
                "discriminator": {"mapping": {"cat": "#/$defs/Cat"}, "propertyName": "kind"},
                "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
            },
            "other": {"allOf": [{"$ref": "#/$defs/Dog"}], "default": {"kind": "dog"}, "description": "another"},
            "path": {"anyOf": [{"format": "path", "type": "string"}, {"type": "null"}], "title": "Path"},
            "day": {"format": "date", "type": "string"},
        },
        "required": ["pet", "other", "path", "day"],
        "title": "Home",
        "type": "object",
        "additionalProperties": False,
    }
    made = grammar.from_schema(given, strict=True)
    start = '{"pet":{"kind":"dog"},"other":{"kind":"dog"},'
    assert accepts(made, start + '"path":null,"day":"2024-02-29"}', *small)
    assert accepts(made, start + '"path":"/x","day":"2024-02-29"}', *small)
    assert not accepts(made, start + '"path":null,"day":"someday"}', *small)


def test_old_tuples(small):
    made = grammar.from_schema({"type": "array", "items": [{"type": "int"}, {"type": "str"}], "minItems": 2})
    assert accepts(made, '[1,"a"]', *small) and not accepts(made, '["a",1]', *small)


def test_keywords_that_are_not_enforced(small):
    given = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    assert accepts(grammar.from_schema(given), "[1,1]", *small)
    with pytest.raises(ValueError, match="uniqueItems"):
        grammar.check(grammar.from_schema(given, strict=True), small[1])


def test_a_client_does_not_set_our_options(small):
    given = {"type": "array", "x-guidance": {"whitespace_pattern": "(.|\n)*", "lenient": True}, "uniqueItems": True}
    with pytest.raises(ValueError, match="uniqueItems"):
        grammar.check(grammar.from_schema(given, strict=True), small[1])


def test_the_given_schema_stays(small):
    before = json.dumps(POINT)
    grammar.from_schema(POINT, strict=True)
    assert json.dumps(POINT) == before


# --- what is drawn


def fits(value, given):
    """Whether `value` is one that the small schema `given` allows."""
    if "enum" in given:
        return value in given["enum"]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    if not isinstance(value, kinds[given["type"]]) or (given["type"] == "integer" and isinstance(value, bool)):
        return False
    if given["type"] == "array":
        return given.get("minItems", 0) <= len(value) <= given.get("maxItems", 9) and all(
            fits(item, given["items"]) for item in value
        )
    if given["type"] == "object":
        known = given["properties"]
        return set(given["required"]) <= value.keys() <= known.keys() and all(fits(value[k], known[k]) for k in value)
    return given["type"] != "string" or re.search(given.get("pattern", ""), value) is not None


@pytest.mark.parametrize("seed", range(12))
def test_answers_fit_the_schema(model, seed):
    given = {
        "type": "object",
        "properties": {
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "kind": {"enum": ["sea", 'the "wave"', 3, None]},
            "words": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,4}$"}, "maxItems": 3},
            "ok": {"type": "boolean"},
            "note": {"type": "string", "maxLength": 12},
        },
        "required": ["count", "kind", "words"],
    }
    text = walk(grammar.from_schema(given, strict=True), *model, random.Random(seed))
    assert fits(json.loads(text), given), text


@pytest.mark.parametrize("seed", range(4))
def test_any_object_is_json(model, seed):
    text = walk(grammar.from_response_format({"type": "json_object"}), *model, random.Random(seed))
    assert isinstance(json.loads(text), dict)


# --- what clients do to it


def nested(depth):
    given: dict = {"type": "string"}
    for _ in range(depth):
        given = {"type": "object", "properties": {"a": given}}
    return given


def chain(count, step):
    """A schema that refers to another one, and so on; `step` puts the reference into a schema."""
    links = {f"a{n}": step({"$ref": f"#/$defs/a{n + 1}"}) for n in range(count)}
    return {"$defs": {**links, f"a{count}": {"type": "object"}}, "$ref": "#/$defs/a0"}


HARD_SCHEMAS = {
    "200 deep": nested(200),
    "100,000 deep": nested(100_000),
    "deep in an enum": {"enum": [nested(100_000)]},
    "enum of 5,000": {"enum": [f"value number {n}" for n in range(5000)]},
    "enum of objects": {"enum": [{"a": n, "b": [n, n]} for n in range(500)]},
    "itself": {"$ref": "#"},
    "loop": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "tree": {"properties": {"children": {"type": "array", "items": {"$ref": "#"}}}},
    "chain of 10,000": chain(10_000, lambda link: link),
    "chain of 900": chain(900, lambda link: {"type": "array", "items": link}),
    "2^40": {
        "$defs": {f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(40)}
        | {"a40": {"type": "object"}},
        "$ref": "#/$defs/a0",
    },
    "2^14 intersections": {
        "allOf": [
            {"anyOf": [{"properties": {f"a{n}": {"type": "string"}}}, {"properties": {f"b{n}": {"type": "integer"}}}]}
            for n in range(14)
        ]
    },
    "30 patterns at once": {"allOf": [{"type": "string", "pattern": f"^.*[a-c]{{{n}}}.{{20}}x"} for n in range(30)]},
    "patterns by reference": {
        "$defs": {f"a{n}": {"pattern": f".*a.{{{n}}}b", "$ref": f"#/$defs/a{n + 1}"} for n in range(30)} | {"a30": {}},
        "$ref": "#/$defs/a0",
    },
    "500 properties": {"properties": {f"p{n}": {"type": "string"} for n in range(500)}},
    "5,000 properties": {"properties": {f"p{n}": {"type": "string"} for n in range(5000)}},
    "2,000 ways": {"anyOf": [{"properties": {f"a{n}": {"type": "string"}}} for n in range(2000)]},
    "pattern": {"type": "string", "pattern": "^(a+)+$"},
    "pattern bomb": {"type": "string", "pattern": "^(x{1,1000}){1,1000}$"},
    "long": {"type": "string", "minLength": 10**9},
    "many items": {"type": "array", "minItems": 2**62, "items": {"type": "string"}},
    "many digits": {"type": "integer", "minimum": int("9" * 400)},
    "multiples": {"type": "integer", "multipleOf": 982451653, "minimum": 10**17, "maximum": 10**18},
    "nothing": {"enum": []},
    "false": False,
}
HARD_REGEXES = {
    "nested": "(a+)+b",
    "repeated": "(x{1,1000}){1,1000}",
    "thrice": "((a{1,100}){1,100}){1,100}b",
    "any": ".{0,100000}x",
    "states": "[a-z]*[ab].{300}",
    "more states": "(.*a.{20}){5}",
    "look": "(?=a)b",
    "behind": "(?<!a)b",
    "back": r"(a)\1",
    "1 MB": "a" * 1_000_000,
    "longest": "ab" * 8192,
    "words": "|".join(f"w{n}" for n in range(2700)),
    "parentheses": "(" * 8000 + ")" * 8000,
    "open": "(a",
    "nothing": r"[^\s\S]",
    "huge": "a{4294967296}",
}
HARD_GRAMMARS = {
    "chain": "start: r0\n" + "".join(f"r{n}: r{n + 1}\n" for n in range(5000)) + 'r5000: "a"',
    "short chain": "start: r0\n" + "".join(f"r{n}: r{n + 1}\n" for n in range(198)) + 'r198: "a"',
    "parentheses": "start: " + "(" * 7000 + '"a"' + ")" * 7000,
    "and": "start: A\nA: " + " & ".join(f"/(?s:.*)[a-z]{{{n}}}b(?s:.*)/" for n in range(1, 60)),
    "left": 'start: start start | "a"',
    "empty": "start: x*\nx:",
    "unknown": "start: nobody",
    "gbnf chain": "root ::= a0\n" + "".join(f"a{n} ::= a{n + 1}\n" for n in range(190)) + 'a190 ::= "x"\n',
    "gbnf parentheses": "root ::= " + "(" * 7000 + '"a"' + ")" * 7000,
    "lines": "\n" * 16_000 + 'start: "a"',
    "doubling": "start: A0\n" + "".join(f"A{n}: A{n + 1} A{n + 1}\n" for n in range(40)) + 'A40: "x"',
    "repeats": 'start: (((("a"{1,1000}){1,1000}){1,1000}){1,1000}){1,1000}',
    "tokens": "start: <[0-99999999999]>",
    "other": "start: @nobody",
}
HARD = [
    *(pytest.param(grammar.from_schema, value, id=f"schema {name}") for name, value in HARD_SCHEMAS.items()),
    *(pytest.param(grammar.from_regex, value, id=f"regex {name}") for name, value in HARD_REGEXES.items()),
    *(pytest.param(grammar.from_lark, value, id=f"grammar {name}") for name, value in HARD_GRAMMARS.items()),
]


@pytest.mark.parametrize("make, value", HARD)
def test_hard_ones_are_answered(large, make, value):
    """Each within 100 ms (the deadline is ten times that), with a short reason where it cannot be used."""
    started = time.process_time()
    try:
        grammar.check(make(value), large)
    except ValueError as error:
        assert 10 < len(str(error)) <= 300 and "\n" not in str(error)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "make, value, reason",
    [
        (grammar.from_schema, {"$ref": "#"}, "no text fits it"),
        (grammar.from_regex, "(?=a)b", "look-around, including look-ahead and look-behind, is not supported"),
        (grammar.from_regex, r"(a)\1", "backreferences are not supported"),
        (grammar.from_lark, "start: nobody", "unknown name"),
    ],
)
def test_reasons(small, make, value, reason):
    for _ in range(2):  # the second time it is remembered
        with pytest.raises(ValueError, match=f"the grammar cannot be used: .*{reason}"):
            grammar.check(make(value), small[1])


def test_references_are_followed_nowhere(small):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"
        for given in ({"$ref": url}, {"$id": url, "$ref": "other.json"}, {"$ref": "file:///etc/passwd"}):
            with pytest.raises(ValueError, match="does not fetch resources"):
                grammar.check(grammar.from_schema(given), small[1])
        with pytest.raises(BlockingIOError):
            server.accept()


def test_the_longest_chains_fit_the_stack(tmp_path):
    """llguidance recurses on the C stack, whose end is the end of the process: what is let through must fit."""
    code = """
import sys, threading
from jaxserve.text import grammar, schema
from tests.text.test_grammar import chain
from tests.text.conftest import train
from jaxserve.text.tokenizer import Tokenizer

table = grammar.token_table(Tokenizer.load(sys.argv[1]))
lists = lambda link: {"properties": {"x": {"type": "array", "items": link}}}
mix = lambda link: {"anyOf": [{"allOf": [lists(link), {"type": "object"}]}, {}]}
steps = [
    lambda link: link,
    lambda link: {"properties": {"x": link}},
    lambda link: {"type": "array", "prefixItems": [link]},
    lambda link: {"anyOf": [link, {"type": "string"}]},
    lambda link: {"allOf": [link]},
    lambda link: {"type": "object", "patternProperties": {"^x": link}},
    mix,
    lambda link: mix(mix(mix(link))),
]
checked = 0
for step in steps:
    for count in (250, 180, 120, 80, 60, 40):
        try:
            made = grammar.from_schema(chain(count, step))
        except ValueError:
            continue
        matcher = grammar.matcher(made, table)
        matcher.compute_bitmask()
        checked += 1
assert checked > 12, checked
for deep in range(0, 12, 4):
    for kind in "rR":
        def inner(n):
            text = f"{kind}{n}"
            for level in range(deep):
                text = f'({text} "b" | "c"){"*?"[level % 2]}'
            return text
        for count in (190, 120, 60):
            rules = "".join(f"{kind}{n}: {inner(n + 1)}\\n" for n in range(count))
            text = f'start: {kind}0\\n{rules}{kind}{count}: "a"'
            try:
                made = grammar.from_lark(text)
            except ValueError:
                continue
            grammar.matcher(made, table).compute_bitmask()
print("fine")
"""
    from tests.text.conftest import train

    (tmp_path / "tokenizer.model").write_bytes(train())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "fine\n", (done.returncode, done.stderr[-2000:])


def test_distinct_grammars_leave_memory_flat(small, monkeypatch):
    monkeypatch.setattr(grammar, "MOST_CHECKED", 500)
    process = psutil.Process()

    def check(numbers):
        for n in numbers:
            given = {"properties": {f"key{n}": {"enum": [f"{n} {m}" for m in range(8)]}}}
            grammar.check(grammar.from_schema(given), small[1])

    check(range(1500))
    before = process.memory_info().rss
    check(range(1500, 5000))
    assert process.memory_info().rss - before < 6 << 20
    assert len(grammar._checked) <= 500


def test_what_was_checked_is_remembered(small, monkeypatch):
    made = grammar.from_regex("remembered [0-9]{3}")
    grammar.check(made, small[1])
    monkeypatch.setattr(grammar, "_fault", lambda *_: pytest.fail("checked twice"))
    grammar.check(made, small[1])


def test_checks_in_threads(small):
    """Threads check different grammars at once, with one table."""
    wrong = []

    def work(seed):
        for n in range(40):
            good, bad = grammar.from_regex(f"a{{{seed + n}}}b"), grammar.from_regex(f"({seed}-{n}")
            grammar.check(good, small[1])
            try:
                grammar.check(bad, small[1])
                wrong.append(bad)
            except ValueError as error:
                if "unclosed group" not in str(error):
                    wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 100, 200, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_limits_are_told():
    with pytest.raises(ValueError, match="3001 different references|1000 are the most"):
        schema.normalized(chain(3000, lambda link: link))
    with pytest.raises(ValueError, match="40 schemas in one another"):
        schema.normalized(nested(41))
    assert schema.normalized(nested(39))
