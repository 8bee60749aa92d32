"""Command line options made from the fields of the config classes, and how a command line's mistakes are told.

Imports nothing slow: `jaxserve --help` answers at once.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import click

from jaxserve.config import MISSING_ENGINE, UNUSED_ENGINE, EngineConfig, GenerationConfig
from jaxserve.knobs import FLAG, Kind

INTERRUPTED = 130  # what shells make of Ctrl-C

# Options of LMDeploy's commands that no config has: name -> (its default, why it has no use here).
UNUSED_COMMAND = {
    "backend": ("turbomind", "there is one engine"),
    "device": ("cuda", "JAX picks the device; JAX_PLATFORMS overrides it"),
}
MISSING_COMMAND = {
    "speculative_algorithm": (None, "speculative decoding is not there yet"),
    "speculative_draft_model": (None, "speculative decoding is not there yet"),
    "speculative_num_draft_tokens": ("1", "speculative decoding is not there yet"),
    "speculative_dflash_block_size": (None, "speculative decoding is not there yet"),
}
RENAMED = {"num_gpu_blocks": "cache_max_entry_count", "block_size": "cache_block_seq_len"}  # LMDeploy's -> ours


class Value(click.ParamType):
    """What a Kind holds, as it is written on a command line."""

    def __init__(self, kind: Kind):
        self.kind = kind
        self.name = getattr(kind.parse, "__name__", "value").strip("_").replace("_", " ")

    def get_metavar(self, param, ctx):
        choices = "|".join(map(str, self.kind.choices))
        return (
            f"[{choices}]" if choices else {"int": "N", "float": "X", "str": "TEXT", "texts": "TEXT,..."}.get(self.name)
        )

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        words = self.kind.words.removesuffix(" (or None)")
        try:
            parsed = self.kind.parse(value)
        except ValueError:
            self.fail(f"it is {words}, not {value!r}", param, ctx)
        if parsed in self.kind.later:
            self.fail(f"{value} is not there yet; it is {words}", param, ctx)
        if not self.kind.holds(parsed):
            self.fail(f"it is {words}, not {value!r}", param, ctx)
        return parsed


class Option(click.Option):
    """An option that stands under a heading of the help."""

    def __init__(self, *declarations, section: str = "Options", **settings):
        super().__init__(*declarations, **settings)
        self.section = section


class Command(click.Command):
    """A command whose help has its options under headings."""

    def format_options(self, ctx, formatter):
        sections: dict[str, list] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(parameter, "section", "Other options"), []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


class Group(click.Group):
    """Commands whose mistakes end in one line and exit status 2."""

    command_class = Command

    def main(self, *args, **settings):
        settings["standalone_mode"] = False
        try:
            status = super().main(*args, **settings)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help())
            status = 2
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            name = context.command_path if context else self.name
            click.echo(f"{name}: {error.format_message()}", err=True)
            status = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            click.echo("interrupted", err=True)
            status = INTERRUPTED
        except BrokenPipeError:  # whoever read the output is gone
            sys.stdout = None
            status = 1
        sys.exit(status if isinstance(status, int) else 0)


def absent(name: str, why: str) -> click.Command:
    """A command of LMDeploy's that is not here, and what to use: else its name would be taken for another thing's."""

    def refuse(rest):
        raise click.UsageError(why)

    rest = click.Argument(["rest"], nargs=-1, type=click.UNPROCESSED)
    return click.Command(
        name, callback=refuse, params=[rest], hidden=True, context_settings={"ignore_unknown_options": True}
    )


def from_field(cls, name: str, *, section: str, option: str | None = None, also: str = "", **settings) -> Callable:
    """A click option for a field of a config class; `option` where its name on the command line is another.

    also: a second spelling, such as --system.
    """
    knob = next(field for field in fields(cls) if field.name == name)
    kind = knob.metadata["kind"]
    words = (option or name).replace("_", "-")
    settings = {
        "default": knob.default,
        "help": knob.metadata["help"],
        "show_default": knob.default is not None,
        "section": section,
        **settings,
    }
    if kind is FLAG:
        return click.option(f"--{words}/--no-{words}", name, cls=Option, **settings)
    spellings = filter(None, (f"--{words}", also, name))
    return click.option(*spellings, cls=Option, type=Value(kind), **settings)


def together(options: tuple) -> Callable:
    """Adds several options to a command, shown in that order."""

    def wrap(command: Callable) -> Callable:
        for one in reversed(options):
            command = one(command)
        return command

    return wrap


def engine_options(command: Callable) -> Callable:
    """Adds an option for every field of EngineConfig, and hidden ones for LMDeploy's that have no use here."""
    for name, (neutral, _) in {**UNUSED_ENGINE, **MISSING_ENGINE, **UNUSED_COMMAND, **MISSING_COMMAND}.items():
        words = name.rstrip("_").replace("_", "-")
        if isinstance(neutral, bool):
            command = click.option(f"--{words}/--no-{words}", name, default=None, hidden=True)(command)
        else:
            command = click.option(f"--{words}", name, default=None, hidden=True)(command)
    for name in RENAMED:
        command = click.option(f"--{name.replace('_', '-')}", name, type=click.IntRange(0), hidden=True)(command)
    for knob in reversed(fields(EngineConfig)):
        command = from_field(EngineConfig, knob.name, section="Engine")(command)
    return command


def sampling_options(command: Callable) -> Callable:
    """Adds the options of GenerationConfig that a conversation has a use for; None where not given."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    for name in reversed(names):
        option = from_field(GenerationConfig, name, section="Sampling", default=None, show_default=False)
        command = option(command)
    return command


def engine_config(given: dict[str, Any], **more) -> EngineConfig:
    """An EngineConfig of the options that `engine_options` added, which it takes out of `given`."""
    names = {field.name for field in fields(EngineConfig)} & given.keys()
    known = {name: given.pop(name) for name in names}
    for name, field in RENAMED.items():
        if value := given.pop(name, None):  # 0 is LMDeploy's "choose"
            known[field] = value
    without_use(given, {**UNUSED_COMMAND, **UNUSED_ENGINE}, {**MISSING_COMMAND, **MISSING_ENGINE})
    with mistakes():
        return EngineConfig(**known, **more)


def without_use(given: dict[str, Any], unused: dict[str, tuple], missing: dict[str, tuple]) -> None:
    """Takes LMDeploy's options out of `given` that are no use here; tables as for `config.accepts`.

    Another value than the neutral one gives a line that says why it is ignored, or UsageError where it is missing.
    """
    for name, (neutral, reason) in {**unused, **missing}.items():
        value = given.pop(name, None)
        if value is None or str(value) == str(neutral):
            continue
        words = name.rstrip("_").replace("_", "-")
        said = f"--{'' if value else 'no-'}{words}" if isinstance(value, bool) else f"--{words} {value}"
        if name in missing:
            raise click.UsageError(f"{said} is not supported: {reason}")
        click.echo(f"warning: {said} is ignored: {reason}", err=True)


@contextmanager
def mistakes() -> Iterator[None]:
    """Turns what is wrong with the user's model, files or options into one line and exit status 2."""
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        raise click.UsageError(str(error) or type(error).__name__) from error


@contextmanager
def interruptible(kept: Callable[[], str] = str) -> Iterator[None]:
    """Ctrl-C ends the process at once: for loading, as a compilation under way would be waited for.

    kept: gives what the same command would go on with, in words, or "".
    """

    def leave(*_):
        click.echo("\n" + "; ".join(filter(None, ("interrupted", kept()))), err=True)
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
