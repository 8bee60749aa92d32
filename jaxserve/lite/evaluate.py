"""What quantization costs: perplexity, and how often the likeliest token stays the same.

The protocol.  The texts of a file (`corpus.texts`; conversations go through the model's chat template, whole, without a
prompt for another reply) stand one behind the other in the file's order, and are cut into windows of `seqlen` tokens
(512), as if no text ended within; what is left at the end is dropped.  Of these windows `samples` are taken, spread
evenly over all (64; 0: all).  In each window every token but the first is scored given those before it in the window,
through the engine: with its weights as the checkpoint has them, its kernels, and its KV cache as configured.
Perplexity is the exponential of the mean cross entropy of all scored tokens.  Agreement is the share of places where
the likeliest token is that of the first row.  A change's error is the standard error of its mean over windows, paired.

The project's own figures: SmolLM2-135M-Instruct on the second half of 1000 ShareGPT exchanges, as
`jaxserve lite eval --text sharegpt_1000.jsonl --part second-half` has them.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxserve import checkpoint, hub
from jaxserve.config import EngineConfig
from jaxserve.engine.loading import load
from jaxserve.lite import corpus
from jaxserve.progress import Lines, bar, stages
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer

AHEAD = 8  # windows that wait while one is computed
STEP = 1024  # most tokens that are scored in one step
KV = {0: "as computed", 8: "int8", 4: "int4", 16: "fp8"}


def score(
    model, config: EngineConfig, windows: np.ndarray, show: bool | Lines | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Scores windows of token ids, int32[n, length], with a model that is loaded for it, and closed again.

    Returns the negative log-likelihood (natural logarithm) of each token after the first, float64[n, length-1], and
    the likeliest token of each of these places, int32[n, length-1].  model and config: as `pipeline` takes them.
    show: progress bars; None: on a terminal.
    """
    with closing(opened(model, config, windows.shape[1], show)) as engine:
        return measure(engine, windows, show)


def opened(model, config: EngineConfig, length: int, show: bool | Lines | None = None):
    """An Engine of `model` that is as small as scoring windows of `length` tokens needs it."""
    path = resolve(model, config)
    page = min(config.cache_block_seq_len, 64)
    pages = 1 + 4 * -(-max(STEP, 2 * length) // page)
    config = replace(
        config,
        session_len=length,
        max_batch_size=max(2, STEP // length),
        cache_block_seq_len=page,
        cache_max_entry_count=pages,
        enable_prefix_caching=False,
    )
    with stages(show) as progress:
        return load(str(path), config, progress=progress, scores_only=True, once=True)


def measure(engine, windows: np.ndarray, show: bool | Lines | None = None, name: str = "scoring"):
    """As `score`, with an Engine."""
    nll, top = [], []
    waiting: deque = deque()
    with bar(len(windows), show, desc=name, unit=" windows") as progress:

        def collect():
            logprob, ids, _ = waiting.popleft().result()
            nll.append(-logprob.astype(np.float64))
            top.append(ids[:, 0].astype(np.int32))
            progress.update()

        try:
            for window in windows:
                if len(waiting) > AHEAD:
                    collect()
                waiting.append(engine.score_async(window.tolist(), "alternatives"))
            while waiting:
                collect()
        finally:
            for future in waiting:
                future.cancel()
    return np.stack(nll), np.stack(top)


def resolve(model, config: EngineConfig) -> Path:
    """Where a model is."""
    return hub.resolve(None if model is None else str(model), config.revision, config.download_dir)


def text_windows(model, config, *, text, part="all", skip=0, take=None, seqlen=512, samples=64, chat_template=None):
    """int32[n, seqlen]: the windows that the protocol makes of a text for a model."""
    with checkpoint.open(resolve(model, config)) as source:
        tokenizer = Tokenizer.load(source)
        template = ChatTemplate.for_model(source.config, tokenizer, chat_template)
    found = corpus.texts(text, part=part, skip=skip, take=take, test=True)
    if found is None:
        raise ValueError(f"--text {text} cannot be loaded; give a file")
    return corpus.windows(found, tokenizer, template, seqlen, samples)


def compare(
    models: Sequence,
    config: EngineConfig,
    policies: Sequence[int] = (0,),
    *,
    report: Callable[[str], None] = lambda line: None,
    show: bool | Lines | None = None,
    **text,
) -> list[dict]:
    """Scores a text with every model and each of its KV caches, one after the other; a dict each.

    models: as for `score`; policies: values of EngineConfig.quant_policy; text: see `text_windows`.  The first row is
    what the others are compared with.  Of a row: model, weights and kv in words, windows, tokens, perplexity, change
    (0.01 is one percent more than the first row's) and its error, agreement (a share; None for the first row), bytes of
    the weights' files, of the weights in memory and of a token in the cache, seconds.
    """
    names = [hub.DEFAULT_NAME if model is None else str(model) for model in models]
    windows = text_windows(models[0], config, **text)
    for model, name in zip(models[1:], names[1:]):  # before minutes are spent
        other = text_windows(model, config, **text)
        if not np.array_equal(windows, other):
            raise ValueError(f"{name} makes other tokens of this text than {names[0]}: they cannot be compared")
    report(f"{len(windows):,} windows of {windows.shape[1]:,} tokens")
    rows: list[dict] = []
    first = None
    for model, name in zip(models, names):
        for policy in policies:
            knobs = replace(config, quant_policy=policy)
            engine = opened(model, knobs, windows.shape[1], show)
            with closing(engine):
                began = time.perf_counter()
                nll, top = measure(engine, windows, show, Path(name).name)
                seconds = time.perf_counter() - began
                row: dict = {"model": name, "weights": weights_in_words(engine), "kv": KV[knobs.quant_policy]}
                plan = engine.plan
            first = (nll, top) if first is None else first
            row |= figures(nll, top, *first) | {
                "file_bytes": file_bytes(engine.path),
                "weight_bytes": plan.weights,
                "kv_bytes_per_token": plan.cache // (plan.pages * plan.page_size),
                "seconds": seconds,
            }
            if not rows:
                row["agreement"] = None
            rows.append(row)
            report(f"{name}, KV {row['kv']}: perplexity {row['perplexity']:.4f} in {seconds:.0f} s")
            del engine
    return rows


def figures(nll, top, first_nll, first_top) -> dict:
    """Perplexity and how it compares with another's, from what `score` returns for the same windows."""
    apart = (nll - first_nll).mean(1)
    ratio = np.exp(apart.mean())
    error = ratio * apart.std(ddof=1) / np.sqrt(len(apart)) if len(apart) > 1 else None
    return {
        "windows": len(nll),
        "tokens": nll.size,
        "perplexity": float(np.exp(nll.mean())),
        "change": float(ratio - 1),
        "change_error": None if error is None else float(error),
        "agreement": float((top == first_top).mean()),
    }


def file_bytes(path) -> int:
    """Bytes of a model's weights on the disk."""
    path = Path(path)
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    if not files:  # of `jaxserve convert`
        files = [file for file in path.rglob("*") if file.suffix not in (".json", ".jinja")]
    return sum(file.stat().st_size for file in files if file.is_file())


def weights_in_words(engine) -> str:
    """How a model's weights are stored."""
    found = engine.checkpoint_config.get("quantization_config")
    if not isinstance(found, dict):
        return engine.dtype
    bits, group = (found.get(a, found.get(b)) for a, b in (("bits", "w_bit"), ("group_size", "q_group_size")))
    parts = [str(found.get("quant_method", "quantized")), f"{bits} bits" if bits else "", f"g{group}" if group else ""]
    return " ".join(filter(None, parts))


def protocol(**text) -> dict:
    """What a reader of the rows needs to make them again."""
    return {"scored": "every token of a window but its first, given those before it in the window", **text}


def table(rows: list[dict]) -> str:
    """The rows for people."""
    head = ("model", "weights", "KV cache", "perplexity", "change", "+-", "same top-1", "files GiB", "KV B/token")
    lines = [head]
    for row in rows:
        first, error = row["agreement"] is None, row["change_error"]
        lines.append((
            Path(row["model"]).name,
            row["weights"],
            row["kv"],
            f"{row['perplexity']:.4f}",
            "" if first else f"{row['change']:+.2%}",
            "" if first or error is None else f"{error:.2%}",
            "" if first else f"{row['agreement']:.2%}",
            f"{row['file_bytes'] / 2**30:.2f}",
            f"{row['kv_bytes_per_token']:,}",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines)]
    left = 3  # columns of words
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )
