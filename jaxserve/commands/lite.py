"""`jaxserve lite`: makes quantized folders, and measures what quantization costs.

What the commands do is in `jaxserve.lite`, imported when they run.
"""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import click

from jaxserve.config import EngineConfig
from jaxserve.options import Group, Option, Value, engine_config, from_field, interruptible, mistakes

PARTS = ("all", "first-half", "second-half")


class Policies(click.ParamType):
    """Values of --quant-policy with commas between them."""

    name = "n,n,..."

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        kind = next(knob.metadata["kind"] for knob in fields(EngineConfig) if knob.name == "quant_policy")
        return tuple(Value(kind).convert(part.strip(), param, ctx) for part in value.split(","))


def option(section: str, *names: str, **settings) -> Callable:
    return click.option(*names, cls=Option, section=section, **{"show_default": True} | settings)


def add(options: tuple) -> Callable:
    """Adds several options to a command, shown in that order."""

    def wrap(command: Callable) -> Callable:
        for one in reversed(options):
            command = one(command)
        return command

    return wrap


# Of the engine's options those that say how a model is read and held.
ENGINE = (
    *(from_field(EngineConfig, name, section="Engine") for name in ("tp", "dtype", "revision", "download_dir")),
    click.option("--device", default=None, hidden=True),
)

# What the commands share that look at a model's activations; LMDeploy's names and defaults.
CALIBRATION = (
    option("Calibration", "--work-dir", metavar="DIR", default="./work_dir", help="the folder that is written"),
    option("Calibration", "--calib-dataset", metavar="FILE|NAME", default="self", help="text to look at: a .txt, "
           ".jsonl or .parquet file; wikitext2, ptb, c4 or pileval (needs the extra `calib`); self: the model writes "
           "its own"),
    option("Calibration", "--calib-samples", type=click.IntRange(1), default=128, help="windows of text"),
    option("Calibration", "--calib-seqlen", type=click.IntRange(2), default=2048, help="tokens of a window"),
    option("Calibration", "--batch-size", type=click.IntRange(1), default=1, help="windows that are computed at once"),
)  # fmt: skip


@click.group(cls=Group)
def lite():
    """Make a model smaller, and measure what that costs."""


@lite.command("eval")
@click.argument("models", metavar="[MODEL] [OTHER]...", nargs=-1)
@add((
    option("Text", "--text", metavar="FILE|NAME", required=True, help="what is scored: .txt, .jsonl (texts or "
           "conversations), .parquet; or wikitext2, ptb, c4, pileval (needs the extra `calib`)"),
    option("Text", "--part", type=click.Choice(PARTS), default="all", help="of the file's texts"),
    option("Text", "--skip", type=click.IntRange(0), default=0, help="leave out this many texts of that part"),
    option("Text", "--take", type=click.IntRange(1), help="then take so many (default: all)"),
    option("Text", "--seqlen", type=click.IntRange(2), default=512, help="tokens of a window"),
    option("Text", "--samples", type=click.IntRange(0), default=64, help="windows, spread evenly over the text; 0: "
           "all there are"),
    option("Text", "--chat-template", metavar="FILE", help="for conversations (default: the model's)"),
    option("Compared", "--quant-policy", type=Policies(), default="0", help="KV caches to try with every model, such "
           "as 0,8,4"),
    option("Compared", "--json", "json_file", metavar="FILE", help="write the rows to FILE, too; - is standard output"),
))  # fmt: skip
@add(ENGINE)
def evaluate(models, quant_policy, json_file, **given):
    """Measure perplexity, and how often the likeliest token is that of the first row.

    A row for every model and KV cache; the first is what the others are compared with.  Without MODEL, or with its
    name, it is SmolLM2-135M-Instruct.  For example:

    \b
      jaxserve lite eval MODEL MODEL-awq --text chats.jsonl --part second-half --quant-policy 0,8
    """
    text = {name: given.pop(name) for name in ("text", "part", "skip", "take", "seqlen", "samples", "chat_template")}
    config = engine_config(given)
    with mistakes(), interruptible():
        from jaxserve.lite.evaluate import compare, protocol, table

        rows = compare(models or (None,), config, quant_policy, report=lambda line: click.echo(line, err=True), **text)
        if json_file == "-":
            click.echo(json.dumps({"protocol": protocol(**text), "rows": rows}))
            return
        click.echo(table(rows))
        if json_file:
            report = {"protocol": protocol(**text), "rows": rows}
            Path(json_file).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
