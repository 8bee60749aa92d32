import json
import random
import threading
import time
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jaxserve.text.tokenizer import TextStream, stop_ids, stop_strings

GOLDEN = json.loads((Path(__file__).parents[1] / "data/smollm2_golden.json").read_text())
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
KINDS = ("smollm2", "spm")
STOPS = st.lists(st.text("abc \n", min_size=1, max_size=4) | st.sampled_from(["the", "��", " 大", "é"]), max_size=3)


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return request.getfixturevalue(request.param)


def ids_of(tokenizer):
    """Random ids, among them many that hold a part of a character, ids of one text, and ids without a token."""
    parts = [id for id, text in enumerate(tokenizer.token_bytes) if len(text) <= 2]
    texts = st.text("abc \n大é🌊", max_size=12).map(lambda text: tokenizer.encode(text, bos=False))
    one = st.sampled_from(parts) | st.integers(0, tokenizer.vocab_size + 2)
    return st.lists(one.map(lambda id: [id]) | texts, max_size=12).map(lambda lists: list(chain(*lists)))


def cut(text, stops, include):
    """The text up to the stop string that is complete first; True if there is one."""
    for end in range(len(text) + 1):
        found = max((len(stop) for stop in stops if text[:end].endswith(stop)), default=0)
        if found:
            return text[: end if include else end - found], True
    return text, False


@cache
def beginnings():
    """All bytes with which a character can begin without being complete; Python also waits for whole surrogates."""
    encoded = [chr(code).encode(errors="surrogatepass") for code in range(0, 0x110000, 64)]
    return {text[:n] for text in encoded for n in range(1, len(text))}


def printable(tokenizer, ids, stops, skip_special):
    """What may be printed after `ids`: no unfinished character, nothing that may still become a stop string."""
    kept = [id for id in ids if id < tokenizer.vocab_size and not (skip_special and id in tokenizer.special_ids)]
    text = b"".join(tokenizer.token_bytes[id] for id in kept)
    unfinished = next((n for n in (1, 2, 3) if text[-n:] in beginnings()), 0)
    text = text[: len(text) - unfinished].decode("utf-8", "replace")
    if tokenizer.strips_space:
        text = text.removeprefix(" ")
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held]


@SHARED
@given(data=st.data(), skip=st.booleans(), include=st.booleans())
def test_stream_equals_decode(tokenizer, data, skip, include):
    ids, stops = data.draw(ids_of(tokenizer)), data.draw(STOPS)
    expected, stopped = cut(tokenizer.decode(ids, skip), stops, include)
    stream = TextStream(tokenizer, stops, skip, include)
    printed = ""
    for n, id in enumerate(ids, 1):
        printed += stream.push(id)
        if not stream.stopped:
            assert printed == printable(tokenizer, ids[:n], stops, skip)
    printed += stream.finish()
    assert (printed, stream.stopped) == (expected, stopped)
    assert stream.push(ids[0] if ids else 0) == "" or not stopped


@SHARED
@given(text=st.text(max_size=40))
def test_round_trip(tokenizer, text):
    known = {bytes for bytes in tokenizer.token_bytes if len(bytes) == 1}
    assume(all(bytes([byte]) in known for byte in text.encode()))  # SmolLM2 has no token for some control characters
    assume("▁" not in text)  # SentencePiece's own character for a space
    assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


@SHARED
@given(data=st.data())
def test_decode_equals_the_library(tokenizer, data):
    """Where the bytes are UTF-8, that is: for byte pieces that are not, it prints another number of U+FFFD."""
    ids = data.draw(ids_of(tokenizer))
    text = tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert text == tokenizer.core.decode(ids)


def test_space_before_a_reply(spm, smollm2):
    ids = spm.encode("sea wave", bos=False)
    assert spm.decode(ids) == "sea wave"
    assert spm.decode(ids, continues=True) == " sea wave"
    stream = TextStream(spm, continues=True)
    assert "".join(map(stream.push, ids)) + stream.finish() == " sea wave"
    assert smollm2.decode(smollm2.encode(" sea")) == " sea"


def test_a_character_is_printed_when_its_last_byte_is_there(tokenizer):
    ids = tokenizer.encode("🌊", bos=False)
    stream = TextStream(tokenizer)
    pieces = [stream.push(id) for id in ids]
    assert len(ids) > 1 and pieces[-1] == "🌊" and "".join(pieces[:-1]) == ""
    stream.push(next(id for id in ids if tokenizer.token_bytes[id].startswith(b"\xf0")))
    assert stream.finish() == "\ufffd"


def test_stop_string_over_tokens(smollm2):
    ids = smollm2.encode("One\n\nUser: two")
    stream = TextStream(smollm2, ["\nUser:", "never"])
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) == "One\n" and stream.stopped and stream.finish() == ""


def test_an_empty_stop_string_is_refused(spm):
    with pytest.raises(ValueError, match="empty"):
        TextStream(spm, [""])


def test_long_stop_strings_cost_little(smollm2):
    """A repetitive stop string that nearly matches at every place is no reason to compare it again and again."""
    stop = "a" * 5000 + "b"
    stream = TextStream(smollm2, [stop])
    (id,) = smollm2.encode("a")
    printed = "".join(stream.push(id) for _ in range(20_000)) + stream.finish()
    assert printed == "a" * 20_000 and not stream.stopped


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["prompt"][:20])
def test_default_model_ids(smollm2, case):
    system = "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = [system, "user\n" + case["prompt"], "assistant\n"]
    text = "<|im_end|>\n".join("<|im_start|>" + turn for turn in turns)
    assert smollm2.encode(text) == case["prompt_ids"]
    assert smollm2.decode(case["prompt_ids"], skip_special=False) == text
    assert smollm2.decode(case["greedy_ids"]) == case["text"]


def test_default_model_tokens(smollm2):
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.eos_ids, smollm2.vocab_size) == (1, 2, {2}, 49152)
    assert smollm2.special_ids == set(range(17))
    assert smollm2.encode("hi") == smollm2.encode("hi", bos=False)  # this model wants no bos
    assert "<|im_start|>" in smollm2.chat_template


def test_special_tokens_as_plain_text(tokenizer):
    text = f"a{tokenizer.named['eos_token']}b"
    assert tokenizer.eos_id in tokenizer.encode(text)
    plain = tokenizer.encode(text, special=False)
    assert tokenizer.eos_id not in plain and tokenizer.decode(plain) == text


def test_what_cannot_be_encoded(tokenizer):
    with pytest.raises(ValueError, match="character 1 is half of a surrogate pair"):
        tokenizer.encode("a\ud83cb")
    with pytest.raises(ValueError, match="not int"):
        tokenizer.encode(3)


def test_word_ids(smollm2, spm):
    for tokenizer in (smollm2, spm):
        words = tokenizer.word_ids(["sea", " sea", "大海", tokenizer.named["eos_token"]])
        assert len(words) == len(set(words)) and (tokenizer.eos_id,) in words
        spelled = [b"".join(tokenizer.token_bytes[id] for id in ids).decode() for ids in words[:-1]]
        assert spelled == ["sea", " sea", "大海", " 大海"]
        for ids, text in zip(words, ("xsea", "x sea"), strict=False):
            assert len(ids) <= len(tokenizer.encode(text, bos=False))


class Words:
    stop_words = ("<|im_end|>", "\nUser:", "<|im_start|>")


def test_stops(smollm2):
    assert stop_ids(smollm2, {}) == {2}
    assert stop_ids(smollm2, {"eos_token_id": [0, 2]}) == {0, 2}
    assert stop_ids(smollm2, {"eos_token_id": 0}, Words) == {0, 1, 2}
    assert stop_strings(smollm2, Words) == ("\nUser:",) and stop_strings(smollm2) == ()
    assert smollm2.split_stops(["x", "<|im_end|>", "x"]) == ({2}, ("x",))


def test_a_long_text_leaves_the_interpreter_to_others(smollm2):
    """A prompt of 1.3 MB stops other threads for 10 ms at most, not for the seconds that it takes."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(5000)]
    text = " ".join(rng.choices(words, k=200_000))
    took = []

    def work():
        started = time.perf_counter()
        smollm2.encode(text)
        took.append(time.perf_counter() - started)

    thread, gaps, last = threading.Thread(target=work), [], time.perf_counter()
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    assert len(text) > 1_200_000
    assert sorted(gaps)[-3] < took[0] / 4 and len(gaps) > 20, (sorted(gaps)[-5:], took)


def test_spelling(smollm2, spm):
    for tokenizer in (smollm2, spm):
        for text in ("sea", " sea", "a<s>b<|im_end|>", "naïve 你好", "\n\n  x", ""):
            ids = tokenizer.spell(text)
            assert b"".join(tokenizer.token_bytes[id] for id in ids) == text.encode()
            assert tokenizer.special_ids.isdisjoint(ids)


def test_threads_share_a_tokenizer(smollm2):
    text, wrong = "The waves of the sea 🌊 " * 50, []
    expected = smollm2.encode(text)

    def work():
        for _ in range(20):
            if smollm2.encode(text) != expected or smollm2.decode(expected) != text:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
