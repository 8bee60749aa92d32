"""Text to calibrate with and to measure on: files and named data sets, and windows of token ids made of them.

A text is a str, or a conversation as a list of OpenAI messages, which goes through the model's chat template.
"""

import json
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxserve import hub

log = logging.getLogger("jaxserve")

Text = str | list[dict]


class Named(NamedTuple):
    """A data set that people know by a short name, and where the `datasets` library finds it."""

    path: str
    column: str
    train: str  # split to calibrate with
    test: str  # split to measure on
    settings: dict[str, Any] = {}  # noqa: RUF012  (never changed)


NAMED = {
    "wikitext2": Named("Salesforce/wikitext", "text", "train", "test", {"name": "wikitext-2-raw-v1"}),
    "ptb": Named("ptb-text-only/ptb_text_only", "sentence", "train", "test", {"revision": "refs/convert/parquet"}),
    "c4": Named(
        "allenai/c4",
        "text",
        "train",
        "validation",
        {
            "data_files": {
                "train": "en/c4-train.00000-of-01024.json.gz",
                "validation": "en/c4-validation.00000-of-00008.json.gz",
            }
        },
    ),
    "pileval": Named("mit-han-lab/pile-val-backup", "text", "validation", "validation"),
}
MOST = 4_000_000  # characters that are taken of a named set: about a million tokens
PARTS = ("all", "first-half", "second-half")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ASKED, ANSWERED = ("prompt", "instruction", "question"), ("reply", "completion", "response", "output", "answer")
PLAIN = ("text", "content", "sentence")
ENCODING = "utf-8-sig"  # UTF-8, and the mark that Windows begins it with


def texts(
    source: str | Path,
    count: int | None = None,
    seed: int = 0,
    *,
    part: str = "all",
    skip: int = 0,
    take: int | None = None,
    test: bool = False,
) -> list[Text] | None:
    """The texts of a .txt, .jsonl, .json or .parquet file, or of one of NAMED through the `datasets` library.

    A .txt file is one text; of the others each record is one: with "text", with a conversation ("messages",
    "conversations" as ShareGPT has them), or with a prompt and a reply.  part, skip and take choose among the file's
    records (of a .txt file, among its lines), and `count` of what is left at random, in the file's order.
    test: of a named set the split to measure on, not the one to train with.

    A named set that cannot be loaded gives a warning of one line, and None.  ValueError says what is wrong with a file.
    """
    if str(source) in NAMED and not Path(source).is_file():
        attempts = logging.getLogger("huggingface_hub")  # of which it tells; what became of them is one line here
        before = attempts.level
        try:
            import datasets

            attempts.setLevel(logging.ERROR)
            hub.reach()
            found = _named(datasets, NAMED[str(source)], test)
        except Exception as error:  # the library's and the network's, of any kind
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            if getattr(error, "name", "") == "datasets":
                reason = "the package datasets is not there (pip install 'jaxserve[calib]')"
            log.warning("the data set %s cannot be loaded: %s", source, reason)
            return None
        finally:
            attempts.setLevel(before)
        return _sampled(selected(found, part, skip, take, str(source)), count, seed)
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"{str(source)!r} is no file, and none of the named sets {', '.join(NAMED)}")
    try:
        if path.suffix.lower() in (".txt", ".md"):
            lines = path.read_text(ENCODING).splitlines(keepends=True)
            return ["".join(selected(lines, part, skip, take, str(path)))]
        records = list(_records(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}; save it as UTF-8") from None
    read = [text for record in selected(records, part, skip, take, str(path)) if (text := text_of(record))]
    if not read:
        keys = sorted(records[0]) if isinstance(records[0], dict) else type(records[0]).__name__
        raise ValueError(
            f"{path}: none of its {len(records)} records has a text: one has text, messages, conversations, or prompt "
            f"and reply; the first has {keys}"
        )
    return _sampled(read, count, seed)


def selected(records: Sequence, part: str, skip: int, take: int | None, name: str) -> Sequence:
    """What part, skip and take leave of the records.  The halves of an odd number: the second has one more."""
    if part not in PARTS:
        raise ValueError(f"part is {', '.join(PARTS)}, not {part!r}")
    if not records:
        raise ValueError(f"{name} is empty")
    half = len(records) // 2
    of = {"all": records, "first-half": records[:half], "second-half": records[half:]}[part]
    chosen = of[skip : None if take is None else skip + take]
    if not chosen:
        raise ValueError(f"{name}: nothing is left of {len(of)} texts ({part}) after skipping {skip}")
    return chosen


def text_of(record) -> Text | None:
    """The text or the conversation of a record, in any of the spellings that such files have; None without one."""
    if isinstance(record, str):
        return record or None
    if not isinstance(record, dict):
        return None
    for key in ("messages", "conversations", "conversation"):
        if isinstance(turns := record.get(key), list) and turns:
            return _conversation(turns)
    asked = next((record[key] for key in ASKED if record.get(key)), None)
    answer = next((record[key] for key in ANSWERED if isinstance(record.get(key), str)), None)
    if asked is not None and answer is not None:
        if isinstance(asked, str) and isinstance(more := record.get("input"), str) and more:
            asked = f"{asked}\n\n{more}"
        before = asked if isinstance(asked, list) else [{"role": "user", "content": str(asked)}]
        return [*before, {"role": "assistant", "content": answer}]
    return next((record[key] for key in PLAIN if isinstance(record.get(key), str) and record[key]), None)


def windows(texts: Iterable[Text], tokenizer, template=None, length: int = 512, count: int | None = None) -> np.ndarray:
    """int32[n, length]: the tokens of all texts, one behind the other, cut into windows.

    Each text begins as the tokenizer has texts begin (some with a BOS token); conversations go through `template`, a
    ChatTemplate.  What is left after the last whole window is dropped.  count: so many windows, spread evenly over all
    there are; None or 0: all.  ValueError where the texts do not fill one window.
    """
    parts, refused, reason = [], 0, ""
    for text in texts:
        try:
            parts.append(np.asarray(_tokens(text, tokenizer, template), np.int32))
        except ValueError as error:  # conversations in the wild have turns that templates refuse
            refused, reason = refused + 1, str(error)
    if refused:
        log.warning("%d texts are left out: %s", refused, reason)
    ids = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    if len(ids) < length:
        raise ValueError(
            f"the text has {len(ids):,} tokens, and a window {length:,}: give more text or shorter windows"
        )
    whole = ids[: len(ids) // length * length].reshape(-1, length)
    if not count or count >= len(whole):
        return whole
    return whole[np.arange(count) * len(whole) // count]


def _tokens(text: Text, tokenizer, template) -> list[int]:
    if isinstance(text, str):
        return tokenizer.encode(text)
    if template is None:
        return tokenizer.encode("\n".join(str(message["content"]) for message in text))
    return template.encode(text, add_generation_prompt=False)


def _conversation(turns: list) -> list[dict] | None:
    """OpenAI messages of turns in OpenAI's or ShareGPT's spelling."""
    messages: list[dict] = []
    for turn in turns:
        if not isinstance(turn, dict):
            return None
        role = str(turn.get("role") or turn.get("from") or ("assistant" if len(messages) % 2 else "user"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(content, str | list):
            return None
        messages.append({"role": ROLES.get(role, role), "content": content})
    while messages and messages[0]["role"] == "assistant":  # what ShareGPT cut off before them
        messages.pop(0)
    return messages or None


def _records(path: Path) -> Iterator:
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{path}: reading parquet needs pyarrow: pip install 'jaxserve[calib]'") from None
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is no parquet file: {error}") from None
    else:
        rows = _json(path)
    if not rows:
        raise ValueError(f"{path} is empty")
    yield from rows


def _json(path: Path) -> list:
    """The records of a JSON list, or of JSON lines."""
    content = path.read_text(ENCODING)
    if content.lstrip().startswith("["):
        parts = {"": content}
    else:
        parts = {f", line {n},": line for n, line in enumerate(content.split("\n"), 1) if line.strip()}
    rows: list = []
    for where, part in parts.items():
        try:
            rows.append(json.loads(part))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}{where} is no JSON: {error}; plain text goes into a .txt file") from None
    return rows if "" not in parts else rows[0]


def _named(datasets, named: Named, test: bool) -> list[Text]:
    rows = datasets.load_dataset(
        named.path, split=named.test if test else named.train, streaming=True, **named.settings
    )
    found, size = [], 0
    for row in rows:
        found.append(row[named.column])
        size += len(row[named.column])
        if size >= MOST:
            break
    if max(map(len, found), default=0) < 2000:  # lines of a running text
        return ["\n".join(found)]
    return found


def _sampled(found: Sequence[Text], count: int | None, seed: int) -> list[Text]:
    if not count or count >= len(found):
        return list(found)
    chosen = sorted(random.Random(seed).sample(range(len(found)), count))
    return [found[index] for index in chosen]
