"""Calibration text: that of a file or a named set, or what the model writes when nobody asks it anything.

A model's own text needs no network, and is in its languages and of its subjects.  It begins as the chat template begins
a user's message, so that the model writes a question first, then an answer, and so on (Xu et al., 2024: Magpie);
without a template it begins as texts do.
"""

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np

from jaxserve import checkpoint, hub
from jaxserve.config import EngineConfig, GenerationConfig
from jaxserve.engine.request import Request
from jaxserve.lite import corpus, evaluate
from jaxserve.progress import Lines, bar, stages
from jaxserve.reply import sampling_params
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer

SELF = "self"
MARK = "\ue000calibration\ue000"
TEXTS = 16  # times as many texts of a data set as windows are asked for are read at most

log = logging.getLogger("jaxserve")


def windows(
    model,
    config: EngineConfig,
    dataset: str,
    count: int,
    length: int,
    report: Callable[[str], object] = log.info,
    show: bool | Lines | None = None,
    scored: int = 0,
) -> tuple[np.ndarray, tuple | None]:
    """int32[n, length], n <= count: token ids to calibrate with; and what `written` says of the last ones.

    dataset: as for `corpus.texts`, or "self".  A named set that cannot be loaded is said so with `report`, and replaced
    by "self".  ValueError where a text does not fill one window.
    """
    if dataset != SELF:
        if dataset in corpus.NAMED:
            report(f"loading the data set {dataset}")
        found = corpus.texts(dataset, count=TEXTS * count)
        if found is not None:
            with checkpoint.open(hub.resolve(model, config.revision, config.download_dir)) as source:
                tokenizer = Tokenizer.load(source)
                template = ChatTemplate.for_model(source.config, tokenizer)
            return corpus.windows(found, tokenizer, template, length, count), None
    report(f"the model writes its own calibration text: {count} windows of {length} tokens")
    return written(model, config, count, length, show, scored)


def written(model, config: EngineConfig, count: int, length: int, show: bool | Lines | None = None, scored: int = 0):
    """int32[count, length]: what the model writes, sampled at temperature 1; the same every time on one machine.

    And of the last `scored` windows what `evaluate.measure` returns, with the bytes of the weights; None for 0.
    """
    from jaxserve.engine.loading import load

    knobs = replace(config, session_len=length + 1, max_batch_size=min(count, 256), enable_prefix_caching=True)
    path = hub.resolve(model, config.revision, config.download_dir)
    with checkpoint.open(path) as source:
        tokenizer = Tokenizer.load(source)
        template = ChatTemplate.for_model(source.config, tokenizer)
    with stages(show) as progress:
        engine = load(str(path), knobs, progress=progress, once=True)
    with closing(engine):
        begin = opening(template, tokenizer)[: length - 1]
        way = GenerationConfig(temperature=1.0, top_k=0, do_sample=True)
        requests = [
            Request(list(begin), length - len(begin), sampling_params(way, tokenizer, seed)) for seed in range(count)
        ]
        _drawn(engine, requests, show)
        found = np.array([request.tokens for request in requests], np.int32)
        before = None
        if scored:
            before = *evaluate.measure(engine, found[-scored:], show, "before"), np.int64(engine.plan.weights)
    return found, before


def _drawn(engine, requests: list[Request], show) -> None:
    """Waits until the requests are answered; nothing reads along, whatever that text is."""
    news: SimpleQueue = SimpleQueue()
    total, over = sum(request.max_new_tokens for request in requests), 0
    for number, request in enumerate(requests):
        request.outbox, request.id = Ends(news), f"calibration.{number}"
        engine.submit(request)
    with bar(total, show, desc="writing", unit=" tokens") as shown:
        while over < len(requests):
            try:
                ended = news.get(timeout=1)
            except Empty:
                ended = None
            shown.update(sum(len(request.tokens) - request.prompt_len for request in requests) - shown.n)
            if ended is not None and ended.finish != "length":
                raise ValueError(f"the model could not write its calibration text: {ended.error or ended.finish}")
            over += ended is not None


class Ends(NamedTuple):
    """The outbox of a request of which only the end is news."""

    news: SimpleQueue

    def put(self, output) -> None:
        """Called by the engine."""
        if output.finish:
            self.news.put(output)


def opening(template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """The tokens that stand before a user's first words, or before a text; at least one."""
    text, bos = "", tokenizer.named.get("bos_token")
    try:
        text, mark, _ = template.render([{"role": "user", "content": MARK}]).partition(MARK)
        text = text if mark else ""
    except ValueError:  # a template that wants more than one message
        pass
    ids = tokenizer.encode(text, bos=not (bos and text.startswith(bos)))
    if not ids:
        ids = [min(tokenizer.eos_ids, default=0) if tokenizer.bos_id is None else tokenizer.bos_id]
    return ids
