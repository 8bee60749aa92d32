"""Calibration text: that of a file or a named set, or what the model writes when nobody asks it anything.

A model's own text needs no network, and is in its languages and of its subjects.  It begins as the chat template begins
a user's message, so that the model writes a question first, then an answer, and so on (Xu et al., 2024: Magpie);
without a template it begins as texts do.
"""

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import numpy as np

from jaxserve import checkpoint, hub
from jaxserve.config import EngineConfig, GenerationConfig
from jaxserve.lite import corpus, evaluate
from jaxserve.progress import Lines, bar, stages
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
    from jaxserve.pipeline import Pipeline

    knobs = replace(config, session_len=length + 1, max_batch_size=min(count, 256), enable_prefix_caching=True)
    path = hub.resolve(model, config.revision, config.download_dir)
    with checkpoint.open(path) as source:
        tokenizer = Tokenizer.load(source)
        template = ChatTemplate.for_model(source.config, tokenizer)
    with stages(show) as progress:
        engine = load(str(path), knobs, progress=progress, once=True)
    with closing(Pipeline(engine, tokenizer, template)) as pipe:
        begin = opening(template, tokenizer)[: length - 1]
        way = GenerationConfig(
            max_new_tokens=length - len(begin), temperature=1.0, top_k=0, do_sample=True, ignore_eos=True
        )
        answers = _drawn(pipe, begin, [replace(way, random_seed=i) for i in range(count)], show)
        if failed := [answer for answer in answers if answer.finish_reason != "length"]:
            reason = failed[0].text or failed[0].finish_reason
            raise ValueError(f"the model could not write its calibration text: {reason}")
        found = np.array([begin + list(answer.token_ids) for answer in answers], np.int32)
        before = None
        if scored:
            before = *evaluate.measure(engine, found[-scored:], show, "before"), np.int64(engine.plan.weights)
    return found, before


def _drawn(pipe, begin, ways, show) -> list:
    """An answer for each of `ways`; progress counts tokens."""
    whole: dict = {}
    replies = pipe._replies([begin] * len(ways), ways, True, live=True)
    total = sum(way.max_new_tokens for way in ways)
    with bar(total, show, desc="writing", unit=" tokens") as shown, closing(pipe.drive(replies)) as news:
        for reply, delta in news:
            shown.update(len(delta.token_ids))
            if reply.finished:
                whole[reply.whole.index] = reply.whole
    return [whole[i] for i in range(len(ways))]


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
