"""`jaxserve chat`: a conversation in the terminal, or over pipes.

Standard output has the conversation and nothing else; plans, progress, figures and warnings go to standard error.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import click

from jaxserve import terminal
from jaxserve.config import EngineConfig, GenerationConfig
from jaxserve.options import interruptible, mistakes
from jaxserve.terminal import FULL, Pace, asker, note, say, tolerant

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
    tolerant()
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
            converse(pipe, chosen, asker())
        except EngineDead as error:
            raise click.ClickException(str(error)) from error


def converse(pipe, config: GenerationConfig, ask: Callable[[], str | None]) -> None:
    """One conversation after the other, until the input ends."""
    session = pipe.session(config)
    terminal.converse(ask, lambda prompt: turn(pipe, session, prompt), session.close)


def turn(pipe, session, prompt: str) -> None:
    """Prints one reply as it comes; Ctrl-C ends it."""
    pace, stopped = Pace(), False
    try:
        with closing(session.stream(prompt)) as pieces:
            for piece in pieces:
                pace.reached(piece.generate_token_len)
                say(piece.text)
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
    if response.generate_token_len:
        note(figures(pipe, response, pace, stopped))


def full(pipe, response) -> bool:
    """Whether the session, not --max-new-tokens, ended the reply."""
    return response.input_token_len + response.generate_token_len >= pipe.session_len


def figures(pipe, response, pace: Pace, stopped: bool) -> str:
    """One line about a reply."""
    made, stats = response.generate_token_len, pipe.engine.stats()
    parts = [f"{made} tokens" + (" (stopped)" if stopped else "")]
    if response.finish_reason == "length" and not full(pipe, response):
        parts[0] += " (cut at --max-new-tokens)"
    parts += pace.figures()
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
