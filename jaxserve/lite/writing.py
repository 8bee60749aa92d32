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
from jaxserve.lite import corpus
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
    show: bool | None = None,
) -> np.ndarray:
    """int32[n, length], n <= count: token ids to calibrate with.

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
            return corpus.windows(found, tokenizer, template, length, count)
    report(f"the model writes its own calibration text: {count} windows of {length} tokens")
    return written(model, config, count, length, show)


def written(model, config: EngineConfig, count: int, length: int, show: bool | None = None) -> np.ndarray:
    """int32[count, length]: what the model writes, sampled at temperature 1; the same every time on one machine."""
    from jaxserve.pipeline import pipeline

    knobs = replace(config, session_len=length + 1, max_batch_size=min(count, 256), enable_prefix_caching=True)
    with closing(pipeline(model, knobs, show_progress=show)) as pipe:
        begin = opening(pipe.template, pipe.tokenizer)[: length - 1]
        way = GenerationConfig(
            max_new_tokens=length - len(begin), temperature=1.0, top_k=0, do_sample=True, ignore_eos=True
        )
        answers: list = pipe([begin] * count, [replace(way, random_seed=i) for i in range(count)], use_tqdm=show)  # type: ignore[assignment]
    if failed := [answer for answer in answers if answer.finish_reason != "length"]:
        raise ValueError(f"the model could not write its calibration text: {failed[0].text or failed[0].finish_reason}")
    return np.array([begin + list(answer.token_ids) for answer in answers], np.int32)


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
