import itertools
import json
import random
import string
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from jaxserve.text import grammar as grammars
from jaxserve.text import tools as formats
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tools import FORMATS, Arguments, Call, Text
from jaxserve.text.tools.rules import MOST_CALLS
from tests.text.walk import accepts, walk


def tool(name, properties=None, **more):
    parameters = {"type": "object", "properties": properties, "required": list(properties)} if properties else None
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


NUMBERS = {"a": {"type": "int"}, "b": {"type": "int"}}
TOOLS = [
    tool("add", NUMBERS),
    tool("mul", NUMBERS),
    tool("say", {"text": {"type": "string", "maxLength": 6}}),
    tool("now"),
]


def read(format, answer, whole=False, cuts=()):
    """The pieces of an answer that comes in cut at `cuts`, as ("text", words) and (name, arguments)."""
    parser, pieces = FORMATS[format].Parser(TOOLS, whole=whole), []
    bounds = [0, *sorted(cuts), len(answer)]
    for start, stop in itertools.pairwise(bounds):
        pieces += parser.feed(answer[start:stop])
    return joined([*pieces, *parser.finish()])


def joined(pieces):
    found, index = [], -1
    for piece in pieces:
        if isinstance(piece, Call):
            index += 1
            assert piece.index == index and piece.id
            found.append((piece.name, []))
        elif isinstance(piece, Text) and (not found or found[-1][0] != "text"):
            found.append(("text", [piece.text]))
        else:
            assert piece.text and (isinstance(piece, Text) or (piece.index == index and found[-1][0] != "text"))
            found[-1][1].append(piece.text)
    return [(name, "".join(parts)) for name, parts in found]


def texts(found):
    return [value for name, value in found if name == "text"]


def calls(found):
    return [(name, value) for name, value in found if name != "text"]


AB = '{"a": 3, "b": 5}'
ADD, MUL, NOW = ("add", AB), ("mul", AB), ("now", "{}")
TAGS = "<|action_start|><|plugin|>"
HERMES = '<tool_call>\n{"name": "add", "arguments": ' + AB + "}\n</tool_call>"

# format, what the model writes, what is found in it
ANSWERS = [
    (
        "internlm2",
        f'I add.{TAGS}\n{{"name": "add", "parameters": {AB}}}<|action_end|>\n',
        [("text", "I add."), ADD, ("text", "\n")],
    ),
    ("internlm2", f'{TAGS}{{"name": "add", "parameters": {AB}}}', [ADD]),
    ("internlm2", f'a \n{TAGS} so: {{"name": "now", "parameters": {{}}}}<|action_end|>', [("text", "a \n"), NOW]),
    ("internlm2", f'<|action_start|> <|plugin|>\n{{"name": "add", "parameters": {AB}}}', [ADD]),
    (
        "internlm2",
        f'{TAGS}\n{{"name": "add", "parameters": {AB}}}<|action_end|>{TAGS}\n{{"name": "mul", "arguments": {AB}}}',
        [ADD, MUL],
    ),
    ("internlm2", "Nothing to call. ", [("text", "Nothing to call. ")]),
    ("internlm2", "<|action_start|><|interpreter|>\nprint(1)", [("text", "<|action_start|><|interpreter|>\nprint(1)")]),
    ("internlm2", f"{TAGS}\n{{'name': 'add'}}", [("text", f"{TAGS}\n{{'name': 'add'}}")]),
    ("hermes", HERMES, [ADD]),
    ("hermes", f"I add.\n\n{HERMES}\n{HERMES.replace('add', 'mul')}\n", [("text", "I add."), ADD, MUL]),
    ("hermes", '<tool_call>{"arguments": ' + AB + ', "name": "add"}</tool_call>', [ADD]),
    ("hermes", '<tool_call>[{"name": "add", "arguments": ' + AB + '}, {"name": "now"}]</tool_call>', [ADD, NOW]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}', [NOW]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 3, \\"b\\": 5}"}</tool_call>', [ADD]),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": "three"}</tool_call>',
        [("text", '<tool_call>{"name": "add", "arguments": "three"}</tool_call>')],
    ),
    (
        "hermes",
        '<tool_call>{"id": 7, "why": [{"x": 1e5}], "name": "add", "arguments": ' + AB + "}</tool_call> Done.",
        [ADD, ("text", "Done.")],
    ),
    (
        "hermes",
        '<tool_call>{"name": "say", "arguments": {"text": "a\nb\t\\u00e9\\""}}</tool_call>',
        [("say", '{"text": "a\\nb\\t\\u00e9\\""}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "fly", "arguments": {}}</tool_call>',
        [("text", '<tool_call>{"name": "fly", "arguments": {}}</tool_call>')],
    ),
    ("hermes", "<tool_call>{oops}</tool_call> so.\n", [("text", "<tool_call>{oops}</tool_call> so.\n")]),
    ("hermes", f"<tool_call>{{oops {HERMES}", [("text", "<tool_call>{oops"), ADD]),
    ("hermes", "\n Hello <tool_", [("text", "\n Hello <tool_")]),
    ("hermes", "<<tool_call>", [("text", "<<tool_call>")]),
    ("hermes", " \n", [("text", " \n")]),
    ("llama3", f'{{"name": "add", "parameters": {AB}}}', [ADD]),
    (
        "llama3",
        f' {{"type": "function", "name": "add", "parameters": {AB}}}; {{"name": "now", "parameters": {{}}}}',
        [ADD, NOW],
    ),
    (
        "llama3",
        f'<|python_tag|>{{"name": "add", "parameters": {AB}}}; {{"name": "mul", "parameters": {AB}}}',
        [ADD, MUL],
    ),
    ("llama3", f"So: <function=add>{AB}</function>", [("text", "So:"), ADD]),
    ("llama3", f"<function=add>{AB}</function>\n<function=mul>{AB}</function> ok", [ADD, MUL, ("text", "ok")]),
    ("llama3", '{"title": "add", "parameters": {}}', [("text", '{"title": "add", "parameters": {}}')]),
    ("llama3", '{"name": "add"}', [("text", '{"name": "add"}')]),
    ("llama3", '{"name": "Ann", "parameters": {}}', [("text", '{"name": "Ann", "parameters": {}}')]),
    ("llama3", "<|python_tag|>add.call(a=3)", [("text", "<|python_tag|>add.call(a=3)")]),
    ("llama3", "<function=fly>{}</function>", [("text", "<function=fly>{}</function>")]),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "add", "arguments": {AB}, "id": "abcdefghi"}}, {{"name": "now", "arguments": {{}}}}]',
        [ADD, NOW],
    ),
    ("mistral", f"[TOOL_CALLS]add[ARGS]{AB}[TOOL_CALLS]mul[ARGS]{AB}", [ADD, MUL]),
    ("mistral", f"I add. [TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{AB}", [("text", "I add."), ADD]),
    ("mistral", f"[TOOL_CALLS]add{AB}", [ADD]),
    ("mistral", "[TOOL_CALLS] Well.\nNo.", [("text", "[TOOL_CALLS] Well.\nNo.")]),
    ("mistral", "[TOOL_CALLS]add mul[ARGS]{}", [("text", "[TOOL_CALLS]add mul[ARGS]{}")]),
]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("format, answer, expected", ANSWERS, ids=[f"{row[0]} {n}" for n, row in enumerate(ANSWERS)])
def test_answers(format, answer, expected, whole):
    assert read(format, answer, whole) == expected
    assert read(format, answer, whole, range(1, len(answer))) == expected


def test_a_broken_call():
    """Told as it comes, it is a call without an end; told whole, it is text."""
    answer = 'So: <tool_call>{"name": "add", "arguments": {"a": 3, "b" 5}}</tool_call>'
    assert read("hermes", answer)[:2] == [("text", "So:"), ("add", '{"a": 3, "b" ')]
    assert read("hermes", answer, whole=True) == [("text", answer)]
    cut = answer[: answer.index(" 5}}")]
    assert read("hermes", cut) == [("text", "So:"), ("add", '{"a": 3, "b"')]
    assert read("hermes", cut, whole=True) == [("text", cut)]
    two = HERMES + answer.removeprefix("So: ")
    assert read("hermes", two, whole=True) == [ADD, ("text", answer.removeprefix("So: "))]


def test_arguments_come_as_they_are_written():
    parser = FORMATS["hermes"].Parser(TOOLS)
    assert parser.feed('<tool_call>\n{"name": "say"') == []
    (begin, first) = parser.feed(', "arguments": {"te')
    assert begin == Call(0, "say", begin.id) and first == Arguments(0, '{"te')
    assert parser.feed('xt": "wav') == [Arguments(0, 'xt": "wav')]
    assert parser.feed('e"') == [Arguments(0, 'e"')]
    assert parser.feed("}") == [Arguments(0, "}")]
    assert parser.feed("}\n</tool_") == [] and parser.feed("call>\n") == [] == parser.finish()


def test_ids():
    def ids(format, answer):
        return [piece.id for piece in FORMATS[format].Parser(TOOLS).feed(answer) if isinstance(piece, Call)]

    both = f'{TAGS}{{"name": "now", "parameters": {{}}}}<|action_end|>{TAGS}{{"name": "add", "parameters": {{}}}}'
    assert ids("internlm2", both) == ["3", "0"]  # their places in the list of tools, as LMDeploy has it
    (one, two) = ids("hermes", HERMES * 2)
    assert one != two and one.startswith("call_") and two.startswith("call_")
    (short,) = ids("mistral", f"[TOOL_CALLS]add[ARGS]{AB}")
    assert len(short) == 9 and set(short) <= set(string.ascii_letters + string.digits)


# --- whatever comes

BITS = [
    *(
        "<tool_call>",
        "</tool_call>",
        TAGS,
        "<|action_end|>",
        "<|python_tag|>",
        "<function=",
        "</function>",
        "[TOOL_CALLS]",
    ),
    *(
        "[ARGS]",
        "[CALL_ID]",
        '{"name": "add", ',
        '"arguments": ',
        '"parameters": ',
        '"name"',
        ": ",
        AB,
        '"add"',
        "add",
        ">",
    ),
    *(
        "{",
        "}",
        "[",
        "]",
        ",",
        '"',
        "\\",
        "\\u00",
        "null",
        "tru",
        "1",
        "-",
        "1e",
        " ",
        "\n",
        "\x00",
        "é",
        "\ud800",
        ";",
        "x",
    ),
]
ANYTHING = st.lists(st.sampled_from(BITS) | st.text(max_size=4), max_size=25).map("".join)
QUICK = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@given(answer=ANYTHING, data=st.data())
@QUICK
def test_pieces_do_not_depend_on_the_cuts(format, whole, answer, data):
    cuts = data.draw(st.lists(st.integers(0, len(answer)), max_size=12))
    at_once = read(format, answer, whole)
    assert read(format, answer, whole, cuts) == at_once == read(format, answer, whole, range(1, len(answer)))
    for name, arguments in calls(at_once):
        assert not whole or isinstance(json.loads(arguments), dict), name


@pytest.mark.parametrize("format", FORMATS)
@given(answer=st.text(alphabet=string.ascii_letters + " \n.é<[{\"'|", max_size=60))
@QUICK
def test_text_is_left_alone(format, answer):
    assert read(format, answer, True) == ([("text", answer)] if answer else [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=5), JSON, max_size=3)


@pytest.mark.parametrize("format", FORMATS)
@given(arguments=OBJECTS, ascii=st.booleans(), indent=st.sampled_from([None, 2]), data=st.data())
@QUICK
def test_all_arguments_come_through(format, arguments, ascii, indent, data):
    """Whatever the arguments are: the pieces join to what was written."""
    written = json.dumps(arguments, ensure_ascii=ascii, indent=indent)
    answer = {
        "internlm2": f'x{TAGS}\n{{"name": "add", "parameters": {written}}}',
        "hermes": f'x\n<tool_call>\n{{"name": "add", "arguments": {written}}}\n</tool_call>',
        "llama3": f"x <function=add>{written}</function>",
        "mistral": f"x[TOOL_CALLS]add[ARGS]{written}",
    }[format]
    cuts = data.draw(st.lists(st.integers(0, len(answer)), max_size=8))
    assert read(format, answer, cuts=cuts) == [("text", "x"), ("add", written)]


LONG = 50_000
HOSTILE = [
    "<tool_call>" * (LONG // 11),
    "<tool_cal" * (LONG // 9),
    TAGS * (LONG // 26),
    (TAGS + '{"name": ') * (LONG // 35),
    "[TOOL_CALLS]add" * (LONG // 15),
    "[TOOL_CALLS]" + "x" * LONG,
    "<function=" * (LONG // 10),
    "<function=add>{" * (LONG // 15),
    '<tool_call>{"name": "add", "arguments": ' + '{"a":' * (LONG // 5),
    '{"name": "add", "parameters": ' + "[" * LONG,
    '{"name": "add", "parameters": {"a": "' + "\\u00e9" * (LONG // 6),
    '{"name": "add", "parameters": {"a": ' + "1" * LONG,
    '{"name": "' + "x" * LONG,
    HERMES * (LONG // len(HERMES)),
    " " * LONG,
    "\n" * LONG + "<tool_call>",
    "{" * LONG,
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: answer[:12].strip() or "blanks")
def test_time_is_linear(format, answer):
    """50,000 characters, at once and one by one: half a second where squares would take minutes."""
    started = time.process_time()
    at_once = read(format, answer)
    assert read(format, answer, cuts=range(1, len(answer))) == at_once
    assert time.process_time() - started < 5


# --- grammars


def spelled(tokenizer, *special, plain=()):
    """The same tokenizer with more tokens."""
    core = tokenizer.core.from_str(tokenizer.core.to_str())
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    return Tokenizer(core, tokenizer.named, tokenizer.bos_ids, tokenizer.eos_ids, tokenizer.templates)


@pytest.fixture(scope="module")
def models(spm):
    """Tokenizers in which the markers are text, and in which they are tokens, with their tables."""
    special = ("<|action_start|>", "<|action_end|>", "<|plugin|>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]")
    made = {
        "text": spm,
        "special": spelled(spm, *special, plain=("<tool_call>", "</tool_call>")),
        "all special": spelled(spm, *special, "<tool_call>", "</tool_call>"),
    }
    return {name: (tokenizer, grammars.token_table(tokenizer)) for name, tokenizer in made.items()}


KINDS = ("text", "special", "all special")


def valid(name, arguments):
    given = json.loads(arguments)
    wanted = {"add": {"a": int, "b": int}, "mul": {"a": int, "b": int}, "say": {"text": str}, "now": {}}[name]
    return given.keys() == wanted.keys() and all(isinstance(given[key], kind) for key, kind in wanted.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", ["required", "mul"])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_forced_calls_are_read_and_valid(models, format, kind, choice, parallel):
    tokenizer, table = models[kind]
    text = FORMATS[format].grammar(TOOLS, choice, parallel, tokenizer)
    grammars.check(text, table)
    for seed in range(3):
        answer = walk(text, tokenizer, table, random.Random(seed), most=600)
        for whole in (False, True):
            found = read(format, answer, whole, range(1, len(answer), 3))
            assert found and not texts(found), (answer, found)
            assert all(valid(name, arguments) for name, arguments in found), answer
            assert choice == "required" or {name for name, _ in found} == {choice}
            assert len(found) == 1 or (parallel and format != "internlm2")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["hermes", "llama3", "mistral"])
def test_forced_calls_may_be_several(models, format, kind):
    tokenizer, table = models[kind]
    old = format == "mistral" and kind == "text"
    answer = {
        "hermes": f"{HERMES}\n{HERMES}",
        "llama3": f'{{"name": "add", "parameters": {AB}}}; {{"name": "mul", "parameters": {AB}}}',
        "mistral": f"[TOOL_CALLS]add[ARGS]{AB}[TOOL_CALLS]mul[ARGS]{AB}",
    }[format]
    if old:
        answer = f'[TOOL_CALLS] [{{"name": "add", "arguments": {AB}}}, {{"name": "mul", "arguments": {AB}}}]'
    for parallel in (True, False):
        text = FORMATS[format].grammar(TOOLS, "required", parallel, tokenizer)
        assert accepts(text, answer, tokenizer, table) == parallel


@pytest.mark.parametrize("kind", KINDS)
def test_forced_calls_come_to_an_end(models, kind):
    """A small model that may only go on calling would do so until its context is full."""
    tokenizer, table = models[kind]
    text = FORMATS["hermes"].grammar(TOOLS, "required", True, tokenizer)
    assert accepts(text, "\n".join([HERMES] * MOST_CALLS), tokenizer, table)
    assert not accepts(text, "\n".join([HERMES] * (MOST_CALLS + 1)), tokenizer, table)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS)
def test_free_answers_may_call(models, format, kind):
    tokenizer, table = models[kind]
    text = FORMATS[format].grammar(TOOLS, "auto", True, tokenizer)
    grammars.check(text, table)
    good = {
        "internlm2": f'{TAGS}\n{{"name": "add", "parameters": {AB}}}',
        "hermes": HERMES,
        "llama3": f'{{"name": "add", "parameters": {AB}}}',
        "mistral": f"[TOOL_CALLS]add[ARGS]{AB}"
        if kind != "text"
        else f'[TOOL_CALLS][{{"name": "add", "arguments": {AB}}}]',
    }[format]

    def fits(answer):
        return accepts(text, answer, tokenizer, table)

    assert fits(good) and fits("the sea, the wave <tag>")
    assert not fits(good.replace('"b": 5', '"b": "five"')) and not fits(good.replace("add", "fly"))
    if format != "llama3":
        assert fits("the sea " + good)


def test_a_schema_with_references(models):
    tokenizer, table = models["text"]
    shared = {"$defs": {"n": {"type": "int"}}, "type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}}
    tools = [{"type": "function", "function": {"name": name, "parameters": shared}} for name in ("add", "mul")]
    text = FORMATS["llama3"].grammar(tools, "required", False, tokenizer)
    assert accepts(text, '{"name": "mul", "parameters": {"a": 5}}', tokenizer, table)
    assert not accepts(text, '{"name": "mul", "parameters": {"a": "5"}}', tokenizer, table)


@pytest.mark.parametrize("format", FORMATS)
def test_tools_that_no_grammar_can_be_made_of(models, format):
    tokenizer, table = models["special"]
    make = FORMATS[format].grammar
    with pytest.raises(ValueError, match="there is no tool 'fly'"):
        make(TOOLS, "fly", True, tokenizer)
    with pytest.raises(ValueError, match="there are no tools"):
        make([], "required", True, tokenizer)
    for parameters, reason in (
        ({"type": "hiccup"}, "tool 'bad': JSON schema: 'hiccup' is no type"),
        ([1], "tool 'bad': parameters is a JSON schema"),
        ({"type": "string"}, "tool 'bad': the type of parameters is object"),
        ({"properties": {f"p{n}": {} for n in range(2000)}}, "tool 'bad': JSON schema: properties has 2000 entries"),
    ):
        tools = [{"type": "function", "function": {"name": "bad", "parameters": parameters}}]
        with pytest.raises(ValueError, match=reason):
            make(tools, "required", True, tokenizer)
    bomb = [tool("bomb", {"a": {"type": "string", "pattern": "(?=a)" + "(x{1,1000}){1,1000}"}})]
    with pytest.raises(ValueError, match="look-around"):
        grammars.check(make(bomb, "required", True, tokenizer), table)


@pytest.mark.parametrize("format", FORMATS)
def test_names_with_any_letters(models, format):
    """A name is a text in JSON, whatever is in it; where it stands without quotes, plain ones are asked for."""
    tokenizer, table = models["text"]
    tools = [tool("get_wave-2.x:y/z"), tool('naïve "你好"\\')]
    text = FORMATS[format].grammar(tools, "required", True, tokenizer)
    grammars.check(text, table)
    found = set()
    for seed in range(8):
        answer = walk(text, tokenizer, table, random.Random(seed))
        parser = FORMATS[format].Parser(tools)
        found |= {piece.name for piece in parser.feed(answer) if isinstance(piece, Call)}
    assert found == {tool["function"]["name"] for tool in tools}


def test_many_tools(models):
    tokenizer, table = models["text"]
    tools = [tool(f"tool_{n}", {"a": {"type": "string"}, "b": {"type": "int"}}) for n in range(200)]
    started = time.perf_counter()
    grammars.check(FORMATS["hermes"].grammar(tools, "required", True, tokenizer), table)
    with pytest.raises(ValueError, match=r"characters long|to compile|too"):
        grammars.check(FORMATS["hermes"].grammar(tools * 10, "required", True, tokenizer), table)
    assert time.perf_counter() - started < 3


# --- which format a model has


def test_names():
    assert formats.named("internlm") == formats.named("intern-s1") == formats.named("InternLM2") == "internlm2"
    assert formats.named("qwen2d5") == formats.named("hermes") == formats.named("qwen3") == "hermes"
    assert formats.named("llama3_json") == "llama3" and formats.named("mistral") == "mistral"
    with pytest.raises(ValueError, match="no tool call format 'pythonic'; there are internlm2, hermes"):
        formats.named("pythonic")
    assert set(formats.NAMES.values()) == set(FORMATS)


def test_detect(spm, smollm2):
    def found(template=None, tokenizer=spm, **config):
        return formats.detect(config, template, tokenizer)

    assert found(model_type="internlm2") == "internlm2"
    assert found("{{ tools }}", spelled(spm, "<|action_start|>", "<|plugin|>")) == "internlm2"
    assert found() == found("{{ messages }}") == formats.detect({}, smollm2.chat_template, smollm2) == "hermes"
    assert found("{{ tools }} <tool_call>") == "hermes"
    assert found("{{ tools }} <tool_call><function=x><parameter=y>") is None
    assert found("{{ tools }} [TOOL_CALLS]") == found("{{ tools }}", spelled(spm, "[TOOL_CALLS]")) == "mistral"
    assert found('{{ tools }} ipython {"name": f, "parameters": d}') == found("{{ tools }}<|python_tag|>") == "llama3"
    assert found("{{ tools }} <other>") is None


def test_a_format_has_all_of_its_parts():
    for module in FORMATS.values():
        assert module.skip_special is False and callable(module.Parser) and callable(module.grammar)
