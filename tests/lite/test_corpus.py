"""Texts from files and named sets, and windows of them."""

import json
import logging
import sys

import numpy as np
import pytest
from huggingface_hub import constants

from jaxserve.lite import corpus
from jaxserve.text.chat import ChatTemplate
from tests import fake_engine

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SPELLINGS = [
    {"messages": TURNS},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"conversation": [{"from": "gpt", "value": "cut"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"prompt": "q", "reply": "a"},
    {"instruction": "q", "input": "", "output": "a"},
]  # fmt: skip


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("record", SPELLINGS, ids=lambda record: next(iter(record)))
def test_a_conversation_in_any_spelling(tmp_path, record):
    assert corpus.texts(jsonl(tmp_path / "a.jsonl", [record])) == [TURNS]


def test_texts_of_every_kind_of_file(tmp_path):
    records = [{"text": "one"}, {"text": "two", "id": 2}, {"nothing": 1}, {"text": "three"}]
    expected = ["one", "two", "three"]
    assert corpus.texts(jsonl(tmp_path / "a.jsonl", records)) == expected
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert corpus.texts(tmp_path / "a.json") == expected
    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree")
    assert corpus.texts(tmp_path / "a.txt") == ["one\n\ntwo\nthree"]
    assert corpus.texts(tmp_path / "a.txt", part="second-half") == ["two\nthree"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    assert corpus.texts(tmp_path / "a.parquet") == ["one", "two"]
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"b\.parquet is no parquet file"):
        corpus.texts(tmp_path / "b.parquet")


def test_parquet_without_its_library(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxserve\[calib\]'"):
        corpus.texts(tmp_path / "a.parquet")


def test_which_of_a_file(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(9)])
    assert corpus.texts(path, part="first-half") == list("0123")
    assert corpus.texts(path, part="second-half") == list("45678")
    assert corpus.texts(path, part="second-half", skip=1, take=2) == list("56")
    some = corpus.texts(path, 4, seed=1)
    assert some == corpus.texts(path, 4, seed=1) == sorted(some) and len(set(some)) == 4
    assert some != corpus.texts(path, 4, seed=3)
    assert corpus.texts(path, 99) == list("012345678")
    with pytest.raises(ValueError, match="nothing is left of 9 texts"):
        corpus.texts(path, skip=9)


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "is empty"),
        ('{"text": "a"}\n{no}', "line 2, is no JSON: .*; plain text goes into a .txt file"),
        ('{"id": 1}', r"none of its 1 records has a text: .*the first has \['id'\]"),
        ("7", "none of its 1 records has a text: .*the first has int"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, content, words):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=words):
        corpus.texts(tmp_path / "a.jsonl")


def test_an_empty_text(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"a\.txt is empty"):
        corpus.texts(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "name, content", [("a.txt", "Größe"), ("a.jsonl", '{"text": "Größe"}'), ("a.json", '["Größe"]')]
)
def test_encodings(tmp_path, name, content):
    """The mark that editors on Windows begin a file with is no part of the text."""
    (tmp_path / name).write_text(content, "utf-8-sig")
    assert corpus.texts(tmp_path / name) == ["Größe"]
    (tmp_path / name).write_text(content, "utf-16")
    with pytest.raises(ValueError, match=f"{name} is not UTF-8: .*; save it as UTF-8"):
        corpus.texts(tmp_path / name)


def test_no_such_file(tmp_path):
    with pytest.raises(ValueError, match="is no file, and none of the named sets wikitext2, ptb, c4, pileval"):
        corpus.texts(tmp_path / "none.txt")


def test_a_named_set_that_cannot_be_loaded(monkeypatch, caplog):
    class Datasets:
        @staticmethod
        def load_dataset(path, **settings):
            logging.getLogger("huggingface_hub.utils").warning("tried in vain")
            raise ConnectionError("no\nway")

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert corpus.texts("wikitext2") is None
    (record,) = caplog.records
    assert "the data set wikitext2 cannot be loaded: " in record.message and "\n" not in record.message


def test_a_named_set_without_its_package(tmp_path, monkeypatch, caplog):
    """A folder of that name is no text, and does not hide the set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ptb").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert corpus.texts("ptb") is None
    assert "ptb cannot be loaded: the package datasets is not there (pip install 'jaxserve[calib]')" in caplog.text


def test_a_named_set_without_a_network(monkeypatch, caplog):
    class Datasets:
        load_dataset = None

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert corpus.texts("ptb") is None
    (record,) = caplog.records
    assert "ptb cannot be loaded: http://127.0.0.1:9 cannot be reached (" in record.message


def test_named_sets(monkeypatch):
    asked = []

    class Datasets:
        @staticmethod
        def load_dataset(path, **settings):
            asked.append((path, settings["split"]))
            return [{"text": "line", "sentence": "line"}] * 3

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert corpus.texts("wikitext2") == ["line\nline\nline"]
    corpus.texts("c4", test=True)
    assert asked == [("Salesforce/wikitext", "train"), ("allenai/c4", "validation")]


@pytest.fixture(scope="module")
def tokenizer():
    return fake_engine.tokenizer()


def test_windows(tokenizer):
    made = corpus.windows(["abcdef", "ghij"], tokenizer, None, 4)
    assert made.dtype == np.int32
    assert [tokenizer.decode(row) for row in made] == ["abcd", "efgh"]
    many = corpus.windows(["".join(chr(97 + i) * 2 for i in range(8))], tokenizer, None, 2, 4)
    assert [tokenizer.decode(row) for row in many] == ["aa", "cc", "ee", "gg"]
    with pytest.raises(ValueError, match="the text has 3 tokens, and a window 4"):
        corpus.windows(["abc"], tokenizer, None, 4)


def test_windows_of_conversations(tokenizer, caplog):
    template = ChatTemplate.for_model({}, tokenizer)
    text = template.render(TURNS, add_generation_prompt=False)
    bad = [{"role": "user", "content": 7}]
    (row,) = corpus.windows([bad, TURNS], tokenizer, template, len(tokenizer.encode(text)))
    assert tokenizer.decode(row, skip_special=False) == text
    assert "1 texts are left out: message 0" in caplog.text
    assert tokenizer.decode(corpus.windows([TURNS], tokenizer, None, 3)[0]) == "q\na"
