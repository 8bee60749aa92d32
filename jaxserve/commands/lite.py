"""`jaxserve lite`: makes quantized folders, and measures what quantization costs.

What the commands do is in `jaxserve.lite`, imported when they run.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

import click

from jaxserve.config import EngineConfig
from jaxserve.options import Command, Group, Option, Value, engine_config, from_field, interruptible, mistakes, together
from jaxserve.progress import Clock, Lines

PARTS = ("all", "first-half", "second-half")


class Policies(click.ParamType):
    """Values of --quant-policy with commas between them."""

    name = "n,n,..."

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        kind = next(knob.metadata["kind"] for knob in fields(EngineConfig) if knob.name == "quant_policy")
        return tuple(Value(kind).convert(part.strip(), param, ctx) for part in value.split(","))


class Share(click.FloatRange):
    """A number from 0 to 1; FloatRange alone takes NaN for one."""

    def __init__(self):
        super().__init__(0, 1)

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not in the range 0<=x<=1.", param, ctx)
        return number


def option(section: str, *names: str, **settings) -> Callable:
    return click.option(*names, cls=Option, section=section, **{"show_default": True} | settings)


# Of the engine's options those that say how a model is read and held.
ENGINE = (
    *(from_field(EngineConfig, name, section="Engine") for name in ("tp", "dtype", "revision", "download_dir")),
    click.option("--device", default=None, hidden=True),
    click.option("--trust-remote-code/--no-trust-remote-code", default=None, hidden=True),
)

# What the commands share that look at a model's activations; LMDeploy's names and defaults.
CALIBRATION = (
    option("Calibration", "--work-dir", metavar="DIR", default="./work_dir", help="the folder that is written"),
    option("Calibration", "--calib-dataset", metavar="FILE|NAME", default="self", help="text to look at: a .txt, "
           ".jsonl or .parquet file; wikitext2, ptb, c4 or pileval (needs the extra `calib`); self: the model writes "
           "its own"),
    option("Calibration", "--calib-samples", type=click.IntRange(1), help="windows of text (default: 128, on a "
           "CPU 32)"),
    option("Calibration", "--calib-seqlen", type=click.IntRange(2), help="tokens of a window (default: 2048, on a CPU "
           "512)"),
    option("Calibration", "--batch-size", type=click.IntRange(1), help="windows that are computed at once (default: 4, "
           "on a CPU 1)"),
)  # fmt: skip


@click.group(cls=Group)
def lite():
    """Make a model smaller, and measure what that costs."""


@lite.command("eval")
@click.argument("models", metavar="[MODEL] [OTHER]...", nargs=-1)
@together((
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
@together(ENGINE)
def evaluate(models, quant_policy, json_file, **given):
    """Measure perplexity, and agreement with the first MODEL.

    A row for every model and KV cache; agreement is how often the likeliest token is that of the first row.  Without
    MODEL, or with its name, it is SmolLM2-135M-Instruct.  For example:

    \b
      jaxserve lite eval MODEL MODEL-awq --text chats.jsonl --part second-half --quant-policy 0,8
    """
    text = {name: given.pop(name) for name in ("text", "part", "skip", "take", "seqlen", "samples", "chat_template")}
    config = engine_config(given)
    with mistakes(), interruptible():
        from jaxserve.lite.evaluate import compare, protocol, table

        if json_file not in (None, "-"):
            Path(json_file).touch()  # said now if it cannot be written, not after an hour
        rows = compare(models or (None,), config, quant_policy, report=lambda line: click.echo(line, err=True), **text)
        if json_file == "-":
            click.echo(json.dumps({"protocol": protocol(**text), "rows": rows}))
            return
        click.echo(table(rows))
        if json_file:
            report = {"protocol": protocol(**text), "rows": rows}
            try:
                Path(json_file).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            except OSError as error:  # a full disk's does not say of what
                raise OSError(f"{json_file} could not be written: {error.strerror}") from None


# ---- folders of quantized models


GPTQ = (
    option("Weights", "--w-bits", type=click.Choice(["4", "8"]), default="4", help="bits of a weight"),
    option("Weights", "--w-sym/--no-w-sym", default=True, help="ranges around 0, which every engine reads"),
    option("Weights", "--w-group-size", type=click.IntRange(1), help="inputs that share a scale (default: 128, or the "
           "largest power of two below that divides the model's)"),
    option("Weights", "--act-order/--no-act-order", default=True, help="round inputs from the largest down; the layout "
           "stays the same"),
    option("Weights", "--desc-act/--no-desc-act", default=False, help="make groups of inputs of like size: a layout "
           "that some engines read slowly or not at all"),
    option("Weights", "--damping", type=Share(), help="of the Hessian, a share of its mean diagonal "
           "(default: 0.01, or more where there is little text)"),
)  # fmt: skip


class Searching(Command):
    """A command whose --search-scale may stand alone, as a flag, or have a value after it."""

    def parse_args(self, ctx, args):
        spelled, other = [], None
        for number, word in enumerate(args):
            spelled.append(word)
            after = args[number + 1] if number + 1 < len(args) else ""
            if word.replace("_", "-") == "--search-scale" and after.lower() not in BOOLEANS:
                spelled.append("true")
                other = other or after
        try:
            return super().parse_args(ctx, spelled)
        except click.UsageError as error:
            if type(error) is not click.UsageError or not other or other.startswith("-"):
                raise
            takes = f"--search-scale stands alone, or before True or False, not before {other!r}"
            raise click.UsageError(f"{error.message.rstrip('.')}; {takes}", ctx) from None  # one word too many


BOOLEANS = ("true", "false", "yes", "no", "on", "off", "t", "f", "y", "n", "1", "0")
# LMDeploy's calibrate, auto_gptq and smooth_quant have it, too.
UNUSED_SEARCH = (click.option("--search-scale", type=click.BOOL, hidden=True),)


@lite.command("auto-gptq", cls=Searching)
@click.argument("model", required=False)
@together(CALIBRATION)
@together(GPTQ)
@together(UNUSED_SEARCH)
@together(ENGINE)
def auto_gptq(model, w_bits, w_sym, w_group_size, act_order, desc_act, damping, **given):
    """Write MODEL with weights of 4 or 8 bits: a GPTQ folder.

    Frantar et al., 2022: weights that are rounded later make up for the errors of those before.  A mixture of
    experts is refused.
    """
    with mistakes():
        from jaxserve.lite import gptq_folder as gptq

        def run(held, windows, folder, batch, progress):
            gptq.quantize(held, windows, folder, settings(held), batch=batch, progress=progress)

        def settings(held):
            group = gptq.group_of(held.cfg, w_group_size)
            return gptq.Settings(group, int(w_bits), w_sym, act_order, desc_act, damping)

        make(model, given, lambda held: settings(held).in_config(), run)


@lite.command("smooth-quant", cls=Searching)
@click.argument("model", required=False)
@together(CALIBRATION)
@together((
    option("Weights", "--quant-dtype", default="int8", metavar="int8|fp8", help="type of weights and activations "
           "(fp8: float8_e4m3fn)"),
    option("Weights", "--alpha", type=Share(), default=0.5, help="how much of the activations' outliers "
           "goes into the weights"),
))  # fmt: skip
@together(UNUSED_SEARCH)
@together(ENGINE)
def smooth_quant(model, quant_dtype, alpha, **given):
    """Write MODEL with weights of 8 bits: a smooth_quant folder.

    LMDeploy's, for activations of 8 bits.  Xiao et al., 2022: outliers of the activations are moved into the weights.
    A mixture of experts is refused.
    """
    with mistakes():
        from jaxserve.lite import smooth_quant as smooth

        if (dtype := smooth.SPELLINGS.get(quant_dtype)) is None:
            raise ValueError(f"--quant-dtype is {', '.join(smooth.SPELLINGS)}, not {quant_dtype!r}")

        def run(held, windows, folder, batch, progress):
            smooth.quantize(held, windows, folder, dtype, alpha=alpha, batch=batch, progress=progress)

        make(model, given, lambda held: smooth.in_config(held.cfg, dtype), run, {"alpha": alpha}, errors_of="weights")


@lite.command("auto-awq", cls=Searching)
@click.argument("model", required=False)
@together(CALIBRATION)
@together((
    option("Weights", "--w-bits", type=click.Choice(["4"]), default="4", help="bits of a weight"),
    option("Weights", "--w-sym/--no-w-sym", default=False, help="ranges around 0: every zero is 8"),
    option("Weights", "--w-group-size", type=click.IntRange(1), help="inputs that share a scale (default: 128, or the "
           "largest power of two below that divides the model's)"),
    option("Weights", "--search-scale", type=click.BOOL, metavar="[BOOL]", help="scales of the inputs of every map; "
           "False: of none (default: of the two maps of a layer that come after a norm)"),
))  # fmt: skip
@together(ENGINE)
def auto_awq(model, w_bits, w_sym, w_group_size, search_scale, **given):
    """Write MODEL with weights of 4 bits: an AWQ folder.

    Lin et al., 2023: inputs that matter are scaled up before rounding, and ranges are cut; then integers are chosen
    that make up for what the rounding before them left behind.  The experts of a mixture are rounded to nearest in that
    last step, since each sees little text; routers stay as they are but for the scales.
    """
    with mistakes():
        from jaxserve.lite import awq

        def settings(held):
            search = {None: "norms", True: "all", False: "none"}[search_scale]
            return awq.Settings(awq.choose_group(held.cfg, w_group_size), w_sym, search)

        def run(held, windows, folder, batch, progress):
            clock = Clock()
            awq.quantize(held, windows, folder, settings(held), batch=batch, progress=progress, clock=clock)
            return clock

        make(
            model,
            given,
            lambda held: settings(held).in_config(awq.skipped(held.cfg)),
            run,
            {"search_scale": search_scale, "version": awq.VERSION},
        )


@lite.command("calibrate", cls=Searching)
@click.argument("model", required=False)
@together(CALIBRATION)
@together(UNUSED_SEARCH)
@together(ENGINE)
def calibrate(model, **given):
    """Write how large the inputs of MODEL's linear maps are.

    Of each input the largest and the mean size.  The file is activations.safetensors in --work-dir: float32[inputs]
    under NAME.absmax and NAME.absmean.
    """
    config, calibration = calibration_of(given)
    with mistakes(), interruptible():
        from jaxserve.lite.making import observe

        observe(model, config, calibration, tell=tell, show=shown())


def make(model: str | None, given: dict, in_config: Callable, run: Callable, settings: dict | None = None, **more):
    """Writes a quantized folder: what the commands that make one have in common.

    given: the options of CALIBRATION and ENGINE; in_config, run, settings, more: of a `making.Scheme`.
    """
    config, calibration = calibration_of(given)
    with mistakes(), interruptible():
        from jaxserve.lite import folder, making

        scheme = making.Scheme(in_config, run, settings or {}, **more)
        with interruptible(partial(folder.kept, calibration.work_dir)):
            making.make(model, config, calibration, scheme, tell=tell, show=shown())


def tell(line: str) -> None:
    """A line for people."""
    click.echo(line, err=True)


def shown() -> Lines | None:
    """How progress is shown: as bars on a terminal, else as lines."""
    return None if sys.stderr.isatty() else Lines(tell)


def calibration_of(given: dict):
    """The EngineConfig and the `making.Calibration` of the options of CALIBRATION and ENGINE."""
    names = {"calib_dataset": "dataset", "calib_samples": "samples", "calib_seqlen": "length", "batch_size": "batch"}
    if given.pop("search_scale", None):
        tell("warning: --search-scale is ignored: auto_awq alone searches for scales")
    device, known = given.pop("device", None), {field: given.pop(name) for name, field in names.items()}
    known["work_dir"] = given.pop("work_dir")
    if device not in (None, "cuda", "cpu"):
        raise click.UsageError(f"--device is cuda or cpu, not {device}")
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"  # read when jax is imported
    config = engine_config(given)
    with mistakes():
        from jaxserve.lite.making import Calibration

        return config, Calibration(**known)
