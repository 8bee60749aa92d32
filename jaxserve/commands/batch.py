"""`jaxserve batch`: answers a file of OpenAI batch lines, in order, and goes on where an earlier run was stopped.

Line n of the output answers line n of the input (empty lines aside), so what is done needs no other record.
"""

import fcntl
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import click

from jaxserve import hub, protocol
from jaxserve.answers import Chat, Completion, scores, usage
from jaxserve.answers import error as openai_error
from jaxserve.config import EngineConfig
from jaxserve.options import INTERRUPTED, interruptible, mistakes
from jaxserve.text import reasoning, tools
from jaxserve.voice import Formats, Message, Voice, best

AHEAD = 2048  # answers that may wait for one before them
BEGINNING = b'{"id": "batch_req_'  # of every answer


def run(
    source: str,
    target: str,
    model: str | None,
    config: EngineConfig,
    *,
    chat_template: str | None = None,
    meta_instruction: str | None = None,
    capability: str = "chat",
    log_level: str = "WARNING",
) -> None:
    """Answers the lines of `source` that `target` does not answer yet."""
    from jaxserve.pipeline import pipeline

    goes_on = f"the same command goes on with what {target} lacks"
    with ExitStack() as stack:
        with mistakes():
            questions, answers = stack.enter_context(opened(source, target))
            total = sum(1 for _ in numbered(questions))
            done = resume(questions, answers)
            if done == total:
                click.echo(f"{target}: all {total} lines are answered", err=True)
                return
            if done:
                click.echo(f"{target}: {done} of {total} lines are answered, going on", err=True)
            with interruptible():
                pipe = pipeline(
                    model,
                    config,
                    chat_template,
                    log_level,
                    meta_instruction=meta_instruction,
                    capability=capability,
                    report=lambda text: click.echo(text, err=True),
                )
        from jaxserve.engine.engine import EngineDead

        stack.enter_context(pipe)
        batch = Batch(pipe, config.model_name or model or hub.DEFAULT_NAME, config.seed or 0)
        try:
            failed = batch.run(questions, answers, done, total)
        except KeyboardInterrupt:
            click.echo(f"interrupted; {goes_on}", err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
        except (EngineDead, OSError) as error:  # the latter: no room on the disk
            raise click.ClickException(f"{error}; {goes_on}") from error
    errors = f", {failed} of them errors" if failed else ""
    click.echo(f"{target}: {total - done} lines answered{errors}", err=True)


@contextmanager
def opened(source: str, target: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Both files, the second for reading and writing by this process alone."""
    if Path(target).exists() and os.path.samefile(source, target):
        raise ValueError(f"{target} is the input, too; give another file for the answers")
    with open(source, "rb") as questions, open(target, "a+b") as answers:
        try:
            fcntl.flock(answers, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {target}") from None
        yield questions, answers


def numbered(questions: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that ask something, with their numbers from 1."""
    questions.seek(0)
    for number, line in enumerate(questions, 1):
        if line.strip():
            yield number, line


def resume(questions: BinaryIO, answers: BinaryIO) -> int:
    """Cuts off an answer that was not written whole, and returns how many there are.

    ValueError where they do not answer the first of the questions.
    """
    asked, count = numbered(questions), 0
    answers.seek(0)
    for line in answers:
        if not line.endswith(b"\n") and line.startswith(BEGINNING[: len(line)]):
            answers.truncate(answers.tell() - len(line))
            break
        count += 1
        number, question = next(asked, (None, b""))
        if number is None:
            raise ValueError(f"{answers.name} has more lines than {questions.name}: it answers something else")
        try:
            found = json.loads(line)["custom_id"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{answers.name}, line {count} is no answer; move the file away to start anew") from None
        if found != (expected := custom_id(question)):
            raise ValueError(
                f"{answers.name}, line {count} answers {found!r}, but line {number} of {questions.name} is "
                f"{expected!r}: it answers something else; give another file"
            )
    answers.seek(0, os.SEEK_END)
    return count


def custom_id(line: bytes) -> str | None:
    """The custom_id of a line as far as it has one."""
    try:
        found = json.loads(line).get("custom_id")
    except (ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


@dataclass
class Line:
    """One line of the input on its way."""

    number: int
    custom_id: str | None
    ask: protocol.Ask = field(init=False)
    error: str | None = None
    prompts: list[list[int]] = field(default_factory=list)  # their token ids
    voices: list[Voice] = field(default_factory=list)
    missing: int = 0  # replies that have not come


class Batch:
    """Answers lines with one pipeline; some thousand are held in memory, whatever the size of the file."""

    def __init__(self, pipe, model: str, seed: int = 0):
        """seed: with a line's number and custom_id it makes the seed of a line that brings none."""
        self.pipe, self.model, self.seed = pipe, model, seed
        self.failed = 0
        described = (pipe.engine.info["checkpoint_config"], pipe.template.tool_style.source, pipe.tokenizer)
        self.formats = Formats(pipe.tokenizer, tools.detect(*described), reasoning.detect(*described))
        self._pending: deque[Line] = deque()  # read, and not yet written
        self._line_of: dict = {}  # of the replies on their way

    def run(self, questions: BinaryIO, answers: BinaryIO, done: int, total: int) -> int:
        """Answers all but the first `done` lines; how many of the answers are errors."""
        from jaxserve.engine.engine import EngineDead
        from jaxserve.progress import bar

        with bar(total, initial=done, unit=" answers") as progress:
            self._answers = answers
            self._progress = progress
            with closing(self.pipe.drive(self._replies(questions, done))) as news:
                for reply, _ in news:
                    if reply.finished:
                        if reply.whole.finish_reason == "error" and not self.pipe.engine.alive:
                            raise EngineDead(reply.whole.error_message)
                        line = self._line_of.pop(reply)
                        line.missing -= 1
                        self._flush()
            self._flush()
        assert not self._pending
        return self.failed

    def _replies(self, questions, done):
        """The replies that the lines ask for, in order; None while enough lines wait for one before them."""
        for count, (number, text) in enumerate(numbered(questions)):
            if count < done:
                continue
            while len(self._pending) >= AHEAD:
                yield None
            line = Line(number, custom_id(text))
            self._pending.append(line)
            try:
                self._prepare(line, text)
            except ValueError as error:
                line.error = f"line {number}: {error}"
                self._flush()
                continue
            line.missing = len(line.voices)
            for voice in line.voices:
                self._line_of[voice.reply] = line
                yield voice.reply

    def _prepare(self, line: Line, text: bytes) -> None:
        """Reads a line, and makes the replies that it asks for."""
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"it is not JSON: {error}") from None
        if not isinstance(given, dict):
            raise ValueError(f"it is an object with custom_id, method, url and body, not {given!r:.80}")
        if line.custom_id is None:
            raise ValueError("custom_id is missing or no text")
        if given.get("method", "POST") != "POST":
            raise ValueError(f"method is POST, not {given['method']!r:.80}")
        if "body" not in given:
            raise ValueError("body is missing")
        advice, seed = self.pipe.generation_config, self._seed_of(line)
        line.ask = ask = protocol.Ask.parse(given.get("url"), given["body"], advice, random_seed=seed)
        if ask.stream:
            raise ValueError("stream: answers of a batch are not streamed")
        if ask.tools and self.formats.tools is None:
            raise ValueError("tools: how this model writes tool calls is not known")
        variables = {"tools": ask.tools, **ask.variables} if ask.do_preprocess else {}
        line.prompts = [self.pipe.tokens(prompt, ask.do_preprocess, **variables) for prompt in ask.prompts]
        line.voices = self.formats.voices(self.pipe.author, ask, line.prompts)

    def _seed_of(self, line: Line) -> int:
        name = f"{self.seed} {line.number} {line.custom_id}".encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest())

    def _flush(self) -> None:
        """Writes the answers that nothing before them is missing for."""
        while self._pending and (self._pending[0].error or self._pending[0].missing == 0):
            line = self._pending.popleft()
            record = json.dumps(self._record(line), ensure_ascii=False)
            self._answers.write(record.encode("utf-8", "replace") + b"\n")
            self._answers.flush()
            self._progress.update()

    def _record(self, line: Line) -> dict:
        """A line of the output, in OpenAI's form."""
        responses = [voice.reply.whole for voice in line.voices]
        failed = next((response for response in responses if response.finish_reason == "error"), None)
        message = line.error or (failed.error_message if failed else None)
        status: int | None = 200
        error = None
        if message is None:
            body = self._body(line)
        else:
            self.failed += 1
            status = failed.error_code if failed else 400
            code = "server_error" if status == 500 else "invalid_request_error"
            body, error = openai_error(message, type=code), {"code": code, "message": message}
        return {
            "id": f"batch_req_{line.number}",
            "custom_id": line.custom_id,
            "response": {"status_code": status, "request_id": f"req_{line.number}", "body": body},
            "error": error,
        }

    def _body(self, line: Line) -> dict:
        form = (Chat if line.ask.chat else Completion)(line.ask, line.prompts, self.pipe.tokenizer)
        if isinstance(form, Completion):
            form.echo(self._scores)
        messages = [Message.of([voice.split(voice.reply.whole)]) for voice in line.voices]
        firsts = [voice.reply.whole for voice in line.voices if voice.reply.whole.choice == 0]
        return {
            "id": f"{form.prefix}-{line.number}",
            "object": form.kind,
            "created": int(time.time()),
            "model": self.model,
            "choices": [form.choice(index, message) for index, message in enumerate(best(messages, line.ask))],
            "usage": usage(
                sum(response.input_token_len for response in firsts),
                sum(voice.reply.whole.generate_token_len for voice in line.voices),
                sum(response.cached_tokens for response in firsts),
                sum(voice.reasoning_tokens for voice in line.voices) if self.formats.reasoning else None,
            ),
        } | form.beside

    def _scores(self, prompts: list[list[int]], alternatives: int):
        score = self.pipe.engine.score_async
        jobs = [score(tokens, "alternatives") if len(tokens) > 1 else None for tokens in prompts]
        return [scores(tokens, job and job.result(), alternatives) for tokens, job in zip(prompts, jobs, strict=True)]
