"""`jaxserve bench serve`: how fast a server answers, as its clients see it.

Drives any server with OpenAI's routes.  Imports nothing heavy before the command runs.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import click

from jaxserve.options import Group, Option, mistakes

ANY = "inf"  # a rate without a limit: all requests at once
WORKS = ("random", "mix")


class Span(click.ParamType):
    """A number of tokens, or a range of them: 128 or 16:1024."""

    name = "n[:n]"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        try:
            low, _, high = value.partition(":")
            span = int(low), int(high or low)
        except ValueError:
            span = (0, 0)
        if not 1 <= span[0] <= span[1]:
            self.fail(f"it is a number from 1 up, or a range like 16:1024, not {value!r}", param, ctx)
        return span


class Numbers(click.ParamType):
    """Numbers with commas between them."""

    def __init__(self, kind):
        self.kind, self.name = kind, "n,n,..."

    def convert(self, value, param, ctx):
        if isinstance(value, list):
            return value
        try:
            numbers = [self.kind(part) for part in value.split(",")]
        except ValueError:
            numbers = [0]
        if min(numbers) <= 0:
            self.fail(f"it is one or more numbers over 0, with commas between them, not {value!r}", param, ctx)
        return numbers


class Limit(click.ParamType):
    """A limit in milliseconds: ttft:500."""

    name = "what:ms"

    def convert(self, value, param, ctx):
        from jaxserve.bench.figures import LIMITS

        name, _, number = value.partition(":")
        name = {"e2el": "e2e"}.get(name, name)
        try:
            return (name, float(number)) if name in LIMITS else self.fail("")
        except (ValueError, click.BadParameter):
            self.fail(f"it is one of {', '.join(LIMITS)} and milliseconds, like ttft:500, not {value!r}", param, ctx)


def option(section, *names, **settings):
    return click.option(*names, cls=Option, section=section, **{"show_default": True} | settings)


OPTIONS = (
    option("Work", "--work", default="random", metavar="random|mix|FILE", help="random prompts; mix: a fixed set of "
           "1000 token-id prompts for 256 clients; or a file: ShareGPT's JSON, or JSON lines with prompt and reply, "
           "prompt and output_len, messages or conversations"),
    option("Work", "-n", "--num-prompts", default=200, type=click.IntRange(1), help="requests of a run (not of mix)"),
    option("Work", "--input-len", default="16:1024", type=Span(), help="tokens of a random prompt"),
    option("Work", "--output-len", type=Span(), help="tokens of an answer (random: 16:512; a file: those of its "
           "answers)"),
    option("Work", "--text", is_flag=True, help="random prompts of words, not of token ids"),
    option("Work", "--token-range", default="1000:32000", type=Span(), help="the ids of random prompts"),
    option("Work", "--tokenizer", metavar="MODEL", help="whose tokenizer counts the tokens of a file; default: the "
           "server, if it has /tokenize, else four characters are one"),
    option("Work", "--seed", default=0, type=int, help="of lengths, prompts, order and arrivals"),
    option("Load", "-c", "--concurrency", type=Numbers(int), help="requests open at a time, or several: a run each; "
           "with a rate, the most  [default: 256 for mix, 64 without a rate]"),
    option("Load", "-r", "--rate", type=Numbers(float), help="requests a second, or several: a run each; inf: all at "
           "once"),
    option("Load", "--burstiness", default=1.0, type=click.FloatRange(0, min_open=True), help="of arrivals at a rate: "
           "1 is a Poisson process, less comes in bursts"),
    option("Load", "--warm-up", default=1, type=click.IntRange(0), help="requests before the first run"),
    option("Load", "--processes", type=click.IntRange(1, 64), help="client processes (default: as the load needs)"),
    option("Request", "--chat", is_flag=True, help="ask /v1/chat/completions, not /v1/completions"),
    option("Request", "--model", metavar="NAME", help="model to ask for (default: the server's first)"),
    option("Request", "--stream/--no-stream", default=True, help="without: only whole requests are timed"),
    option("Request", "--ignore-eos/--no-ignore-eos", default=True, help="answers have the length asked for"),
    option("Request", "--temperature", default=0.0, type=click.FloatRange(0), help="of the answers"),
    option("Request", "--extra-body", metavar="JSON", default="{}", show_default=False, help="more fields of every "
           "request"),
    option("Request", "--timeout", default=600.0, type=click.FloatRange(0, min_open=True), help="seconds a request may "
           "take"),
    option("Request", "--api-key", envvar="OPENAI_API_KEY", help="key of the server (also: $OPENAI_API_KEY)"),
    option("Report", "--goodput", multiple=True, type=Limit(), help="count requests within a limit: ttft, tpot, itl or "
           "e2e, and milliseconds; may be given several times"),
    option("Report", "--json", "json_file", metavar="FILE", help="write all figures to FILE; - is standard output"),
    option("Report", "--plot", metavar="FOLDER", help="draw PNG files there (needs the extra `bench`)"),
    option("Report", "--compare", nargs=2, metavar="A.json B.json", help="only compare two files of --json"),
)  # fmt: skip


@click.group(cls=Group)
def bench():
    """Measure a server."""


@bench.command()
@click.argument("url", required=False)
def serve(url, compare, json_file, plot, goodput, **given):
    """Load the server at URL with requests and time its answers.

    For example: `jaxserve bench serve http://127.0.0.1:23333 -c 1,16,64,256 --plot pictures`.
    """
    with mistakes():
        if compare:
            click.echo(compared(*compare))
            return
        if not url:
            raise click.UsageError("the URL of a server is missing")
        if plot:
            needs_matplotlib()
        if json_file and not Path(json_file).absolute().parent.is_dir():
            raise ValueError(f"--json {json_file}: there is no such folder")
        report, samples = measure(url, limits=dict(goodput), **given)
        if json_file == "-":
            click.echo(json.dumps(report))
        elif json_file:
            Path(json_file).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if plot:
            from jaxserve.bench import plots

            title = f"{report['model']}, {report['work']}"
            for file in plots.draw(plot, report["runs"], samples, title):
                click.echo(f"drawn: {file}", err=True)
    if all(run["errors"] == run["requests"] for run in report["runs"]):
        raise click.exceptions.Exit(1)


for add in OPTIONS:
    add(serve)


def measure(url: str, *, limits: dict[str, float], **given) -> tuple[dict, list]:
    """The report of all runs as plain data, and the samples of each.  Tables go to standard error."""
    from jaxserve.bench import drive, figures

    url = plain(url)
    try:
        extra = json.loads(given["extra_body"])
        assert isinstance(extra, dict)
    except (json.JSONDecodeError, AssertionError):
        raise ValueError(f"--extra-body is a JSON object, not {given['extra_body']!r}") from None
    key = given["api_key"]
    target = drive.Target(
        url, given["model"] or drive.first_model(url, key), given["chat"], given["stream"], given["ignore_eos"],
        given["temperature"], given["timeout"], key, extra,
    )  # fmt: skip
    items = work_items(target, given)
    wanted = [item.output for item in items] if target.ignore_eos else None
    if given["warm_up"]:
        first = [items[i % len(items)] for i in range(given["warm_up"])]
        record = drive.run(target, first, concurrency=1)["records"][-1]
        if record["error"]:
            raise OSError(f"the first request fails: {record['error']}")
    report = {
        "url": url, "model": target.model, "work": given["work"], "endpoint": "chat" if target.chat else "completions",
        "stream": target.stream, "seed": given["seed"], "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": [],
    }  # fmt: skip
    samples = []
    for load, concurrency, rate in loads(given):
        result = one_run(target, items, load, concurrency, rate, given)
        run = {"load": load, "concurrency": concurrency, "rate": rate}
        run |= figures.summary(result, limits, wanted)
        report["runs"].append(run)
        samples.append(figures.samples(result["records"]))
        click.echo(f"\n{load}, {target.model}, {given['work']}\n{figures.table(run)}", err=True)
    if len(samples) > 1:
        click.echo("\n" + figures.rows(report["runs"]), err=True)
    return report, samples


def one_run(target, items, load, concurrency, rate, given) -> dict:
    from jaxserve.bench import drive, work
    from jaxserve.progress import bar

    plan = None
    if rate is not None:
        plan = work.arrivals(len(items), rate, given["burstiness"], given["seed"])
    shown = bar(len(items), desc=load, unit=" requests", leave=False)
    try:
        return drive.run(
            target, items, concurrency=concurrency, plan=plan, processes=given["processes"], progress=shown.update
        )
    finally:
        shown.close()


def loads(given: dict) -> list[tuple[str, int | None, float | None]]:
    """(name, concurrency, rate) of each run."""
    rates, concurrencies = given["rate"], given["concurrency"]
    if rates:
        if concurrencies and len(concurrencies) > 1:
            raise ValueError("--rate goes with one --concurrency at most")
        most = concurrencies[0] if concurrencies else None
        return [(f"{rate:g} req/s", most, None if rate == float(ANY) else rate) for rate in rates]
    from jaxserve.bench.work import MIX_CLIENTS

    concurrencies = concurrencies or [MIX_CLIENTS if given["work"] == "mix" else 64]
    return [(f"{count} clients", count, None) for count in concurrencies]


def work_items(target, given: dict) -> list:
    """What is asked for."""
    from jaxserve.bench import drive, work

    name, outputs = given["work"], given["output_len"]
    if name == "mix":
        if target.chat:
            raise ValueError("mix is made of token ids, which the chat endpoint does not take")
        return work.mix()
    if name == "random":
        ids = None if given["text"] or target.chat else given["token_range"]
        return work.made_up(given["num_prompts"], given["input_len"], outputs or (16, 512), given["seed"], ids=ids)
    if outputs and outputs[0] != outputs[1]:
        raise ValueError("with a file --output-len is one number")
    if not Path(name).is_file():
        raise ValueError(f"--work is {', '.join(WORKS)} or a file, and there is no file {name}")
    counter = tokenizer_counter(given["tokenizer"]) if given["tokenizer"] else drive.asked_counter(target)
    if counter is None:
        click.echo("the server has no /tokenize: four characters count as a token (or give --tokenizer)", err=True)
    items = work.conversations(name, given["num_prompts"], given["seed"], counter, output=outputs and outputs[0])
    if len(items) < given["num_prompts"]:
        click.echo(f"{name} has {len(items)} exchanges of a length that benchmarks keep", err=True)
    return items


def tokenizer_counter(model: str):
    from jaxserve import checkpoint, hub
    from jaxserve.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(checkpoint.open(hub.resolve(model)))
    return lambda texts: [len(tokenizer.encode(text, bos=False)) for text in texts]


def plain(url: str) -> str:
    """A server's address without the path that clients' base URLs have."""
    url = url if "://" in url else f"http://{url}"
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"a server's URL begins with http:// or https://, not {url!r}")
    try:
        urlsplit(url).port  # noqa: B018  the library would try any number
    except ValueError as error:
        raise ValueError(f"{url!r} is no server's URL: {error}") from None
    return url.rstrip("/").removesuffix("/v1")


def compared(first: str, second: str) -> str:
    from jaxserve.bench import figures

    return f"A: {first}\nB: {second}\n\n{figures.comparison(read_report(first), read_report(second))}"


def read_report(file: str) -> dict:
    """What --json has written.  ValueError for another file."""
    text = Path(file).read_bytes()
    try:
        report = json.loads(text)
        if all(run["load"] for run in report["runs"]):
            return report
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{file} is no report of `jaxserve bench serve --json`")


def needs_matplotlib() -> None:
    """ValueError before an hour of measuring, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'jaxserve[bench]'") from None
