import itertools
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text import grammar as grammars
from jaxserve.text import reasoning
from jaxserve.text.reasoning import Splitter
from jaxserve.text.tools import hermes
from tests.text.test_tools import HERMES, TOOLS, spelled
from tests.text.walk import accepts

# what comes, whether the prompt began the thoughts, thoughts, words
ANSWERS = [
    ("<think>\nHm, well.\n</think>\n\nIt is 8.", False, "Hm, well.", "It is 8."),
    ("\n<think>Hm</think>8", False, "Hm", "8"),
    ("Hm\n\nwell\n</think>\n\nIt is 8.\n", True, "Hm\n\nwell", "It is 8.\n"),
    ("<think>\nHm</think>8", True, "Hm", "8"),  # says it although the prompt did
    ("<think>\n\n</think>\n\n8", False, "", "8"),
    ("It is <think>8</think>", False, "", "It is <think>8</think>"),
    (" \nIt is 8.", False, "", " \nIt is 8."),
    ("a </th b</think>c </think> d", True, "a </th b", "c </think> d"),
    ("Hm, I am not don", True, "Hm, I am not don", ""),
    ("<think>Hm </thi", False, "Hm </thi", ""),
    ("<thin", False, "", "<thin"),
    ("", True, "", ""),
    (" \n", False, "", " \n"),
    (" \n", True, "", ""),
]


def split(name, open, answer, cuts=()):
    splitter, thoughts, words = Splitter(name, open), "", ""
    bounds = [0, *sorted(cuts), len(answer)]
    for start, stop in itertools.pairwise(bounds):
        more, rest = splitter.feed(answer[start:stop])
        thoughts, words = thoughts + more, words + rest
    more, rest = splitter.finish()
    return thoughts + more, words + rest


@pytest.mark.parametrize("answer, open, thoughts, words", ANSWERS)
def test_answers(answer, open, thoughts, words):
    assert split("think", open, answer) == (thoughts, words)
    assert split("think", open, answer, range(1, len(answer))) == (thoughts, words)


def test_what_is_certain_comes_at_once():
    splitter = Splitter("think")
    assert splitter.feed("<thi") == ("", "") and splitter.feed("nk>\nI see") == ("I see", "")
    assert splitter.feed(" the </") == (" the", "") and splitter.feed("sea> \n") == (" </sea>", "")
    assert splitter.feed("x</think>") == (" \nx", "") and splitter.feed("\nIt") == ("", "It")
    assert splitter.feed(" is </think>") == ("", " is </think>") and splitter.finish() == ("", "")


def test_other_tags():
    assert split("mistral", False, "[THINK]Hm[/THINK]8") == ("Hm", "8")
    assert split("seed_oss", False, "<seed:think>Hm</seed:think>8") == ("Hm", "8")


BITS = ["<think>", "</think>", "<th", "ink>", "</", "think>", " ", "\n", "a", "é", "<", ">", "\ud800"]
ANYTHING = st.lists(st.sampled_from(BITS) | st.text(max_size=3), max_size=20).map("".join)


@given(answer=ANYTHING, open=st.booleans(), data=st.data())
@settings(max_examples=500, deadline=None)
def test_pieces_do_not_depend_on_the_cuts(answer, open, data):
    cuts = data.draw(st.lists(st.integers(0, len(answer)), max_size=10))
    at_once = split("think", open, answer)
    assert split("think", open, answer, cuts) == at_once == split("think", open, answer, range(1, len(answer)))
    joined = "".join(at_once)
    without = answer.replace("<think>", "").replace("</think>", "")
    if "think" not in without:  # the tags fall away at most, and blanks around them
        left = joined.replace("<think>", "").replace("</think>", "")
        assert "".join(left.split()) == "".join(without.split())


@pytest.mark.parametrize("bit", ["<think>", "</think>", "</thin", "a", " ", "<", "\n</"])
def test_time_is_linear(bit):
    answer = bit * (100_000 // len(bit))
    started = time.process_time()
    for open in (True, False):
        assert split("think", open, answer) == split("think", open, answer, range(1, len(answer)))
    assert time.process_time() - started < 5


def test_whether_a_prompt_begins_the_thoughts():
    assert reasoning.opens("think", "<|im_start|>assistant\n<think>\n")
    assert not reasoning.opens("think", "<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not reasoning.opens("think", "<|im_start|>assistant\n")
    assert reasoning.opens("deepseek-r1", "<|Assistant|>") and not reasoning.opens("deepseek-r1", "<think>\n</think>\n")


def test_names():
    assert reasoning.named("default") == reasoning.named("qwen3") == reasoning.named("intern-s1") == "think"
    assert (
        reasoning.named("deepseek_r1") == reasoning.named("DeepSeek-R1") == reasoning.named("qwen-qwq") == "deepseek-r1"
    )
    with pytest.raises(ValueError, match="no reasoning format 'deep'; there are think"):
        reasoning.named("deep")
    assert set(reasoning.NAMES.values()) == set(reasoning.FORMATS)


def test_detect(spm, smollm2):
    assert reasoning.detect({}, smollm2.chat_template, smollm2) is None is reasoning.detect({}, None, spm)
    assert reasoning.detect({}, "{{ content.split('</think>')[-1] }}", spm) == "think"
    assert reasoning.detect({}, "x", spelled(spm, "<think>", "</think>")) == "think"
    assert reasoning.detect({}, "x", spelled(spm, "[THINK]", "[/THINK]")) == "mistral"


@pytest.mark.parametrize("special", [False, True])
def test_a_grammar_allows_thoughts(spm, special):
    tokenizer = spelled(spm, "<think>", "</think>") if special else spm
    table = grammars.token_table(tokenizer)
    inner = grammars.from_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    free = reasoning.allow_thoughts(inner, "think", False, tokenizer)
    grammars.check(free, table)
    json.loads(free)
    for good in ('{"a":1}', '<think>\nHm {"b"} well.\n</think>\n\n{"a":1}', '<think></think>{"a":1}'):
        assert accepts(free, good, tokenizer, table), good
    for bad in (
        '<think>Hm</think>{"b":1}',
        '<think>Hm{"a":1}',
        '{"a":1} more',
        "8",
        '<think>Hm</think>\n\n\n\n{"a":1}',
    ):
        assert not accepts(free, bad, tokenizer, table), bad
    calls = hermes.grammar(TOOLS, "required", True, tokenizer)
    thought_out = reasoning.allow_thoughts(calls, "think", False, tokenizer)
    grammars.check(thought_out, table)
    assert accepts(thought_out, f"<think>\nI add.\n</think>\n\n{HERMES}\n{HERMES}", tokenizer, table)
    assert not accepts(thought_out, f"<think>\nI add.\n</think>\n\nSo: {HERMES}", tokenizer, table)
    begun = reasoning.allow_thoughts(inner, "think", True, tokenizer)
    assert accepts(begun, 'Hm</think>{"a":1}', tokenizer, table)
    assert not accepts(begun, '{"a":1}', tokenizer, table)
