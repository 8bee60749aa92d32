"""The command `jaxserve`.  What the commands do is in `jaxserve.commands`, imported when they run."""

import logging

import click

from jaxserve import __version__
from jaxserve.commands.bench import bench
from jaxserve.commands.lite import lite
from jaxserve.config import GenerationConfig
from jaxserve.options import (
    Command,
    Group,
    Option,
    absent,
    engine_config,
    engine_options,
    from_field,
    mistakes,
    sampling_options,
)
from jaxserve.serve.command import client, serve, ui

LEVELS = ("debug", "info", "warning", "error")


def log_level(command):
    """Adds --log-level, which works at once."""

    def set_level(ctx, parameter, level):
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("jaxserve").setLevel(level.upper())
        return level.upper()

    return click.option(
        "--log-level",
        type=click.Choice(LEVELS, case_sensitive=False),
        default="warning",
        show_default=True,
        callback=set_level,
        help="least severity of what is logged",
    )(command)


def template_options(command):
    """Adds the options of how messages become a prompt."""
    for option in reversed(TEMPLATE_OPTIONS):
        command = option(command)
    return command


TEMPLATE_OPTIONS = (
    click.option(
        "--chat-template",
        cls=Option,
        section="Prompt",
        metavar="FILE",
        help="chat template: a .jinja file, a .json file as LMDeploy has them, or internlm2, base "
        "(default: the model's)",
    ),
    click.option(
        "--meta-instruction",
        "--system",
        "meta_instruction",
        cls=Option,
        section="Prompt",
        metavar="TEXT",
        help="the system message",
    ),
    click.option(
        "--cap",
        "capability",
        cls=Option,
        section="Prompt",
        type=click.Choice(["completion", "chat"]),
        default="chat",
        show_default=True,
        help="chat; completion goes on with the text as it stands",
    ),
)


@click.group(
    cls=Group,
    name="jaxserve",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "max_content_width": 100,
    },
)
@click.version_option(__version__, message="jaxserve %(version)s")
def main():
    """Large language models with JAX, on CPU and NVIDIA GPUs.

    MODEL is a folder, a GGUF file or a Hugging Face id; without one it is SmolLM2-135M-Instruct.
    """


class Chat(Command):
    """`chat turbomind MODEL`, as LMDeploy once had it, gets told how it is written here."""

    def parse_args(self, ctx, args):
        engine, *rest = args or [""]
        if engine in ("turbomind", "torch") and rest and not rest[0].startswith("-"):
            raise click.UsageError(f"there is one engine: `jaxserve chat {rest[0]}`", ctx)
        return super().parse_args(ctx, args)


@main.command(cls=Chat)
@click.argument("model", required=False)
@template_options
@from_field(
    GenerationConfig,
    "max_new_tokens",
    section="Sampling",
    default=1024,
    show_default=True,
    help="most tokens of a reply",
)
@sampling_options
@engine_options
@log_level
def chat(model, **given):
    """Talk with MODEL in the terminal.

    An empty line ends the input; `exit` leaves, `end` starts a new conversation; Ctrl-C stops a reply.  Where the input
    is no terminal, it is read in the same way up to its end.  Sampling follows the model's generation_config.json, and
    is greedy for a model without one.
    """
    config = engine_config(given)
    from jaxserve.commands.chat import run

    run(model, config, **{name: value for name, value in given.items() if value is not None})


@main.command()
@click.argument("source", metavar="IN.jsonl", type=click.Path(exists=True, dir_okay=False))
@click.argument("target", metavar="OUT.jsonl", type=click.Path(dir_okay=False, writable=True))
@click.option(
    "--model",
    cls=Option,
    section="Engine",
    metavar="MODEL",
    help="folder, GGUF file or Hugging Face id (default: SmolLM2-135M-Instruct)",
)
@template_options
@engine_options
@log_level
def batch(source, target, model, **given):
    """Answer the requests of IN.jsonl, in order, into OUT.jsonl.

    Lines are as in OpenAI's batch files: chat completions and completions.  A line that cannot be answered gets an
    error for an answer.  The same command after an interruption goes on where OUT.jsonl ends.
    """
    config = engine_config(given)
    from jaxserve.commands.batch import run

    run(source, target, model, config, **{name: value for name, value in given.items() if value is not None})


def lmdeploy_convert(ctx, parameter, value):
    """LMDeploy's `convert NAME PATH --dst-path DIR`: with the name in the model's place it would not be understood."""
    if value is not None:
        raise click.UsageError(
            f"without a name and --dst-path: `jaxserve convert PATH {value}`; other commands take PATH as it is, too"
        )


@main.command()
@click.argument("model", required=True)
@click.argument("folder", metavar="DIR", type=click.Path())
@engine_options
@log_level
@click.option("--dst-path", hidden=True, is_eager=True, expose_value=False, callback=lmdeploy_convert)
def convert(model, folder, **given):
    """Save MODEL in DIR as the engine keeps it in memory.

    Later starts convert nothing.  The result is for the same --tp and --dtype.  `jaxserve chat DIR` uses it.
    """
    config = engine_config(given)
    with mistakes():
        from jaxserve.engine.loading import convert as save
        from jaxserve.progress import stages

        with stages() as progress:
            save(model, folder, config, report=click.echo, progress=progress)


@main.command("check-env")
@click.option("--dump-file", metavar="FILE", type=click.Path(dir_okay=False), help="write the report to FILE too")
def check_env(dump_file):
    """Report versions, devices, memory and settings."""
    from jaxserve.check_env import report

    with mistakes():
        click.echo(report(dump_file))


for command in (bench, serve, client, ui, lite):
    main.add_command(command)
main.add_command(absent("list", "there are no names of chat templates to choose from: a checkpoint brings its own"))
lite.add_command(absent("kv-qparams", "not needed: --quant-policy 8 or 4 of the other commands finds scales by itself"))
