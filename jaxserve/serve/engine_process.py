"""The engine's process: loads the model, then answers web processes over the socket until the launcher says otherwise.

What it tells the launcher (see `children.Line`): failed(status, message), ready(info), and once a second
beat(inside, idle).  What it is told: drain, stop.  It ends by itself when the launcher does.
"""

import logging
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxserve import hub
from jaxserve.config import EngineConfig
from jaxserve.serve import logs
from jaxserve.serve.children import Line
from jaxserve.serve.options import ServerOptions
from jaxserve.terminal import dim

log = logging.getLogger("jaxserve")

DIED, USAGE, MODEL, DEVICE = 1, 2, 3, 4  # exit statuses
BEAT, QUICK_BEAT = 1.0, 0.05  # seconds; the quick one while the launcher waits for the end
LAST_WORDS = 3.0  # seconds that the engine gets to end its requests
LONGEST = 600  # characters of an error


class Failure(Exception):
    """Why there is no engine: the exit status, and one line for people."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def main(
    line: Line, path: Path, model: str | None, config: EngineConfig, options: ServerOptions, again: bool = False
) -> int:
    """The whole life of the process; the socket will be at `path`.  Returns the exit status.

    again: the web processes are there, and write to the same terminal.
    """
    commands: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_hear, args=(line, commands, path.parent), daemon=True).start()
    logs.configure(options.log_level, options.log_format)
    try:
        engine = load(model, config, options, again)
    except Failure as failure:
        log.debug("the engine could not be started", exc_info=failure)
        line.tell(event="failed", status=failure.status, message=str(failure))
        return failure.status
    from jaxserve.engine.link import Listener
    from jaxserve.serve.door import Door
    from jaxserve.serve.metrics import Meter

    door = Door(
        engine,
        meter=Meter(model_names(model, config)[0]),
        max_queued=options.max_queued_requests,
        max_queued_tokens=options.max_queued_tokens,
        max_concurrent=options.max_concurrent_requests,
        request_timeout=options.request_timeout,
    )
    with Listener(door, path) as listener:
        line.tell(event="ready", info=door.info)
        status = _attend(line, commands, door, listener)
        _let_go(door)
    return status


def model_names(model: str | None, config: EngineConfig) -> list[str]:
    """The names under which a model answers, the first being told: those given, or what it was called."""
    if config.model_name:
        return [name.strip() for name in config.model_name.split(",") if name.strip()]
    if model is None:
        return [hub.DEFAULT_NAME]
    if Path(model).expanduser().exists():
        return list(dict.fromkeys((Path(model).expanduser().resolve().name, model)))
    return [model]


def load(model: str | None, config: EngineConfig, options: ServerOptions, again: bool = False):
    """The engine, with what is loaded and how far it is on standard error.  Failure says why there is none."""
    people = options.log_format == "text" and sys.stderr.isatty() and not again
    report = _tell_people if people else _log_lines
    report("loading")
    with _failing(MODEL):
        from jaxserve import checkpoint
        from jaxserve.models.config import from_hf
        from jaxserve.text import reasoning, tools
        from jaxserve.text.chat import ChatTemplate
        from jaxserve.text.grammar import token_table
        from jaxserve.text.tokenizer import Tokenizer, stop_ids

        path = hub.resolve(model, config.revision, config.download_dir)
        with checkpoint.open(path) as source:  # text first: it is quick, and the web processes need it
            from_hf(source.config)
            tokenizer, its_config, advice = Tokenizer.load(source), source.config, source.generation_config
    with _failing(USAGE):
        if options.tool_call_parser:
            tools.named(options.tool_call_parser)
        if options.reasoning_parser:
            reasoning.named(options.reasoning_parser)
    with _failing(USAGE if options.chat_template else MODEL):
        template = ChatTemplate.for_model(
            its_config, tokenizer, options.chat_template, options.meta_instruction, options.capability
        )
        if options.tool_call_parser and not template.takes_tools and tools.named(options.tool_call_parser) != "hermes":
            log.warning(
                "--tool-call-parser %s: the chat template knows no tools, so they are told in Hermes' way, and calls "
                "in that way are not read; leave the option out, or give a --chat-template that fits it",
                options.tool_call_parser,
            )
        table = token_table(tokenizer, stop_ids=stop_ids(tokenizer, advice, template))
    with _failing(DEVICE):
        from jaxserve.engine import loading
    with _failing(MODEL), checkpoint.open(path) as source:
        loading.model_config(source, config)
    from jaxserve.progress import stages

    with _failing(DEVICE), stages(None if people else False) as progress:
        return loading.load(str(path), config, report=report, progress=progress, guide=table)


def _let_go(door) -> None:
    """Ends what still runs, so that whoever waits for it is told.

    Does not wait until programs and memory are given back, which takes seconds: they go with the process.
    """
    threading.Thread(target=door.close, daemon=True).start()
    until = time.monotonic() + LAST_WORDS
    while not door.idle and time.monotonic() < until:
        time.sleep(0.01)


@contextmanager
def _failing(status: int) -> Iterator[None]:
    """Turns what goes wrong into a Failure; a checkpoint's fault is the model's whenever it shows."""
    from jaxserve.checkpoint import CheckpointError

    try:
        yield
    except CheckpointError as error:
        raise Failure(MODEL, _one_line(error)) from error
    except (ValueError, OSError, MemoryError, RuntimeError, ImportError) as error:
        raise Failure(status, _one_line(error)) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


def _tell_people(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(dim(text), file=sys.stderr)  # above a bar, where there is one


def _log_lines(text: str) -> None:
    for row in text.splitlines():
        log.info("%s", row)


def _attend(line, commands, door, listener) -> int:
    """Until the launcher says stop, or the engine is dead."""
    ticker, state = logs.Ticker(door.stats, log), listener.state
    while True:
        try:
            command = commands.get(timeout=QUICK_BEAT if state == "draining" else BEAT)
        except queue.Empty:
            command = None
        if command == "stop":
            return 0
        if command == "drain":
            door.drain()
        if not door.alive:
            log.error("the engine has stopped")
            return DIED
        stalled = ticker.look()
        if stalled and not listener.stalled:
            log.error("no step of the engine has ended for a minute")
        listener.stalled = stalled
        if listener.state != state:
            state = listener.state
            listener.announce()
        line.tell(event="beat", inside=door.stats()["inside"], idle=door.idle)


def _hear(line, commands, folder):
    """The launcher's words.  When it is gone, so is this process, whatever it is doing."""
    while (messages := line.hear()) is not None:
        for message in messages:
            commands.put(message["say"])
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(DIED)
