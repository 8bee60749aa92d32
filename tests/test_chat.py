"""`jaxserve chat` as a person and as a pipe meet it, on an engine without a model."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve import GenerationConfig, terminal
from jaxserve.commands import chat
from tests import fake_engine
from tests.screen import Screen

COMMAND = [sys.executable, "-m", "tests.fake_engine", "chat"]
ASKS = "double enter to end input >>>"
HOME = Path(__file__).parents[1]


def piped(text, *arguments, **environment):
    data = text if isinstance(text, bytes) else text.encode()
    done = subprocess.run(
        [*COMMAND, *arguments], input=data, capture_output=True, cwd=HOME, env=os.environ | environment, timeout=60
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def screen(cache_folder):
    made = []

    def start(*arguments, **environment):
        made.append(Screen([*COMMAND, *arguments], **environment))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture
def talk(capsys):
    """A whole conversation in this process: what came out, and what was said beside it."""

    def run(text, **given):
        stream = io.StringIO(text)
        with fake_engine.make() as pipe:
            chat.converse(pipe, GenerationConfig(**given), lambda: terminal.read(stream))
        return capsys.readouterr()

    return run


def test_piped_input_prints_the_answers_alone():
    status, out, err = piped("What is it?\n\nand\nthen\n\nexit\n\n")
    assert (status, out) == (0, "answer 1: What is it?\nanswer 2: and\nthen\n")
    assert err.count(ASKS) == 3 and "the memory plan" in err and "greedy" in err


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a", "answer 1: a\n"),
        ("a\n", "answer 1: a\n"),
        ("", ""),
        ("\n\n\n", ""),
        ("exit", ""),
        ("a\n\nend\n\nb\n\n", "answer 1: a\nanswer 1: b\n"),
        ("\n\na\n\n", "answer 1: a\n"),
        ("a\r\n\r\nexit\r\n\r\n", "answer 1: a\n"),
        ("exit now\n\n", "answer 1: exit now\n"),
        ("é🙂中\n\n", "answer 1: é🙂中\n"),
    ],
    ids=repr,
)
def test_inputs(text, expected, talk):
    assert talk(text)[0] == expected


def test_input_that_is_no_utf8():
    assert piped(b"\xff!\n\n")[:2] == (0, "answer 1: \ufffd!\n")


def test_a_line_about_each_reply(talk):
    _, err = talk("hello\n\n")
    figures = r"\[15 tokens(, [\d.]+ tokens/s)?, first after [\d.]+ s, session 25/256, cache 36 %, memory "
    assert re.search(figures + r"[\d.]+ GiB\]", err)


def test_a_full_session_says_what_to_do(talk):
    out, err = talk("x" * 300 + "\n\nshort\n\n")
    assert out == "\nanswer 1: short\n" and err.count(chat.FULL) == 1
    out, err = talk("x" * 150 + "\n\n")
    assert out.startswith("answer 1: xxx") and chat.FULL in err


def test_a_cut_reply_says_so(talk):
    out, err = talk("hello\n\n", max_new_tokens=5)
    assert out == "answe\n" and "5 tokens (cut at --max-new-tokens)" in err


def test_a_failed_reply_says_why(talk):
    out, err = talk("\0\n\nb\n\n")
    assert out == "\nanswer 1: b\n" and "error: it never fits" in err


def test_seed_and_sampling():
    first, second = (piped("hi\n\nho\n\n", "--top-k", "5", "--seed", "7") for _ in range(2))
    assert first[1] == second[1] and "(seed " in first[1]
    assert "sampling with top_k 5, temperature 1" in first[2]


def test_system_message():
    _, out, err = piped("hi\n\n", "--system", "Be kind.")
    assert out == "answer 1: hi\n" and f"session {19 + len('<s:Be kind.>')}/256" in err


def test_completion_goes_on_with_the_text():
    status, out, _ = piped("once\n\nand\n\n", "--cap", "completion")
    assert (status, out) == (0, "answer 0: once\nanswer 0: onceanswer 0: onceand\n")


def test_a_conversation_in_a_terminal(screen):
    talk = screen()
    talk.ask("two\rlines")
    assert "answer 1: two\nlines" in talk.wait_for("GiB]")
    talk.ask("more")
    talk.wait_for("answer 2: more")
    talk.ask("end")
    talk.wait_for("new conversation")
    talk.ask("again")
    talk.wait_for("answer 1: again")
    talk.ask("exit")
    assert talk.status() == 0


def test_history_and_line_editing(screen, cache_folder):
    talk = screen()
    talk.ask("first question")
    talk.wait_for("answer 1: first question")
    talk.ask("exit")
    assert talk.status() == 0
    assert "first question" in (cache_folder / "chat_history").read_text()
    talk = screen()
    talk.wait_for(ASKS)
    talk.type("\x1b[A\x1b[A")  # up, twice
    talk.wait_for("first question")
    talk.type("!\r\r")
    talk.wait_for("answer 1: first question!")
    talk.wait_for(ASKS)
    talk.type("\x04")
    assert talk.status() == 0


def test_a_cache_folder_that_cannot_be_written(screen, cache_folder):
    cache_folder.write_text("in the way")
    talk = screen()
    talk.ask("hello")
    talk.wait_for("answer 1: hello")
    talk.ask("exit")
    assert talk.status() == 0


def test_control_c_ends_the_reply_and_not_the_program(screen):
    talk = screen(FAKE_DELAY="0.05")
    talk.ask("x" * 60)
    talk.wait_for("answer 1: xx")
    talk.type("\x03")
    assert "(stopped)" in talk.wait_for("GiB]")
    talk.ask("y")
    talk.wait_for("answer 2: y")
    talk.ask("exit")
    assert talk.status() == 0


def test_control_c_at_the_prompt(screen):
    talk = screen()
    talk.wait_for(ASKS)
    talk.type("half a thou\x03")
    talk.wait_for("Ctrl-C again or Ctrl-D leaves")
    talk.ask("hello")
    talk.wait_for("answer 1: hello")
    talk.wait_for(ASKS)
    talk.type("\x03")
    talk.wait_for("Ctrl-C again")
    talk.wait_for(ASKS)
    talk.type("\x03")
    assert talk.status() == 0


def test_a_reply_cannot_take_over_the_terminal(screen):
    talk = screen()
    talk.wait_for(ASKS)
    talk.type("a\x11\x07b\r\r")  # Ctrl-Q: the next key as it is
    talk.wait_for("answer 1: a\u2407b")


def test_a_broken_pipe_is_no_traceback():
    command = f"printf 'a\\n\\nb\\n\\n' | {' '.join(COMMAND)} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=HOME)
    assert "Traceback" not in done.stderr
