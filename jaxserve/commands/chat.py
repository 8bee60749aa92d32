"""`jaxserve chat`: a conversation in the terminal, or over pipes.

Standard output has the conversation and nothing else; plans, progress, figures and warnings go to standard error.
"""

import io
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import click

from jaxserve import hub
from jaxserve.config import EngineConfig, GenerationConfig
from jaxserve.options import interruptible, mistakes

PROMPT = "\ndouble enter to end input >>> "
FULL = "WARNING: exceed session max length. Please end the session."
HINT = "(Ctrl-C again or Ctrl-D leaves; end and an empty line start a new conversation)"
# What a reply may do to a terminal: lines and tabs; the other control characters are shown as pictures.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421, 155: 0xFFFD}
GIB = 1 << 30


def run(
    model: str | None,
    config: EngineConfig,
    *,
    chat_template: str | None = None,
    meta_instruction: str | None = None,
    capability: str = "chat",
    log_level: str = "WARNING",
    **sampling,
) -> None:
    """Loads the model and talks until the input ends."""
    from jaxserve.pipeline import pipeline

    config = replace(config, max_batch_size=config.max_batch_size or 1)  # one person talks; fewer programs to compile
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    note("loading")
    with mistakes(), interruptible():
        pipe = pipeline(
            model,
            config,
            chat_template,
            log_level,
            meta_instruction=meta_instruction,
            capability=capability,
            report=note,
        )
    from jaxserve.engine.engine import EngineDead

    with pipe:
        with mistakes():
            chosen = GenerationConfig.from_hf(pipe.generation_config, **sampling)
        note(_describe(chosen))
        try:
            converse(pipe, chosen, _asker())
        except EngineDead as error:
            raise click.ClickException(str(error)) from error


def note(text: str) -> None:
    """A line for the person, not part of the conversation."""
    click.secho(text, err=True, dim=True)


def converse(pipe, config: GenerationConfig, ask: Callable[[], str | None]) -> None:
    """Turns until `ask` returns None or exit."""
    session = pipe.session(config)
    while (prompt := ask()) is not None and prompt.strip() != "exit":
        if prompt.strip() == "end":
            session.close()
            note("a new conversation")
        elif prompt.strip():
            turn(pipe, session, prompt)


def turn(pipe, session, prompt: str) -> None:
    """Prints one reply as it comes; Ctrl-C ends it."""
    clean = sys.stdout.isatty()
    times, stopped = [time.perf_counter()], False
    try:
        with closing(session.stream(prompt)) as pieces:
            for piece in pieces:
                times.append(time.perf_counter())
                sys.stdout.write(piece.text.translate(PICTURES) if clean else piece.text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        stopped = True
    except ValueError as error:  # the chat template's, about this turn
        click.echo(f"\nerror: {error}", err=True)
        return
    print(flush=True)
    response = session.response
    if response is None:
        return
    if response.finish_reason == "error":
        click.echo(f"error: {response.error_message}", err=True)
    elif response.finish_reason == "length" and full(pipe, response):
        click.echo(FULL, err=True)
    if response.generate_token_len and len(times) > 1:
        note(figures(pipe, response, times, stopped))


def full(pipe, response) -> bool:
    """Whether the session, not --max-new-tokens, ended the reply."""
    return response.input_token_len + response.generate_token_len >= pipe.session_len


def figures(pipe, response, times: list[float], stopped: bool) -> str:
    """One line about a reply."""
    made, stats = response.generate_token_len, pipe.engine.stats()
    parts = [f"{made} tokens" + (" (stopped)" if stopped else "")]
    if response.finish_reason == "length" and not full(pipe, response):
        parts[0] += " (cut at --max-new-tokens)"
    if len(times) > 2 and times[-1] > times[1]:
        parts.append(f"{(made - 1) / (times[-1] - times[1]):.1f} tokens/s")
    parts.append(f"first after {times[1] - times[0]:.2f} s")
    held = response.input_token_len + made
    parts.append(f"session {held:,}/{pipe.session_len:,}")
    filled, blank = stats["pages_used"] + stats["pages_cached"], stats["pages_free"]
    parts.append(f"cache {100 * filled / (filled + blank):.0f} %")
    parts.append(f"memory {memory_used() / GIB:.2f} GiB")
    return "[" + ", ".join(parts) + "]"


def memory_used() -> int:
    """Bytes taken on the fullest GPU, or on the CPU by this process."""
    import jax
    import psutil

    taken = [(device.memory_stats() or {}).get("bytes_in_use", 0) for device in jax.local_devices()]
    return max(taken) or psutil.Process().memory_info().rss


def _describe(config: GenerationConfig) -> str:
    if config.greedy:
        return "greedy sampling (--temperature, --top-k or --top-p change that)"
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    default = GenerationConfig()
    shown = [f"top_k {config.effective_top_k}"] + [
        f"{name} {getattr(config, name):g}"
        for name in names
        if name == "temperature" or getattr(config, name) != getattr(default, name)
    ]
    return "sampling with " + ", ".join(shown)


def _asker() -> Callable[[], str | None]:
    if sys.stdin.isatty() and sys.stdout.isatty():
        note("exit leaves, end starts a new conversation, Ctrl-C stops a reply")
        return _terminal()
    return lambda: read(sys.stdin)


def read(stream) -> str | None:
    """Lines up to an empty one or the end of the input; None where there is no more."""
    sys.stderr.write(PROMPT)
    sys.stderr.flush()
    lines: list[str] = []
    for line in iter(stream.readline, ""):
        if not (line := line.rstrip("\r\n")):
            return "\n".join(lines)
        lines.append(line)
    sys.stderr.write("\n")
    return "\n".join(lines) if lines else None


def _terminal() -> Callable[[], str | None]:
    """Input with line editing and history."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event):
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and not buffer.document.current_line:
            buffer.text = buffer.text.rstrip("\n")  # the history keeps no empty lines
            buffer.validate_and_handle()
        else:
            buffer.insert_text("\n")

    session: PromptSession = PromptSession(
        multiline=True, key_bindings=keys, history=_history(), reserve_space_for_menu=0
    )

    def ask() -> str | None:
        warned = False
        while True:
            try:
                print()
                return session.prompt(PROMPT.lstrip("\n"), prompt_continuation="").rstrip("\n")
            except KeyboardInterrupt:
                if warned:
                    return None
                warned = True
                note(HINT)
            except EOFError:
                return None

    return ask


def _history():
    """The history file of the cache folder, or none where it cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    file = hub.cache_dir() / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab"):
            return FileHistory(str(file))
    except OSError:
        return InMemoryHistory()
