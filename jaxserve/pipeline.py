"""The Python API: a model, loaded once, that answers prompts; with LMDeploy's names.

`jaxserve/__init__.py` imports this module at once (the function has the module's name), so what is slow to import is
imported where it is used.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.config import ChatTemplateConfig, EngineConfig, GenerationConfig

if TYPE_CHECKING:
    from jaxserve.reply import Reply, Response

log = logging.getLogger("jaxserve")

Prompt = str | list[dict] | list[int]  # a text, OpenAI messages, token ids


def pipeline(
    model: str | Path | None = None,
    backend_config: EngineConfig | None = None,
    chat_template_config: ChatTemplateConfig | str | Path | None = None,
    log_level: str | int | None = None,
    *,
    model_path: str | Path | None = None,
    meta_instruction: str | None = None,
    capability: str | None = None,
    report: Callable[[str], Any] = log.info,
    show_progress: bool | None = None,
) -> Pipeline:
    """Loads a model and returns a Pipeline that answers with it.

    model: a folder, a GGUF file, a hub's id, or None for the default model; model_path is LMDeploy's name of it.
    chat_template_config: also a .jinja or .json file, or a built-in template's name.  meta_instruction: the system
    message of a chat without one.  capability: "chat", or "completion" for prompts that are continued as they stand.
    report(text) gets the memory plan and what was chosen.  show_progress: bars while loading; None: on a terminal.
    ValueError says what is wrong with the model, the configuration, or the machine for them.
    """
    if model is not None and model_path is not None:
        raise ValueError("model_path is another name of model: give one of the two")
    if not isinstance(backend_config, EngineConfig | None):
        raise ValueError(f"backend_config is an EngineConfig, not {backend_config!r}")
    from jaxserve import checkpoint, hub
    from jaxserve.progress import stages
    from jaxserve.text.chat import ChatTemplate
    from jaxserve.text.tokenizer import Tokenizer

    if log_level is not None:
        log.setLevel(log_level)
    config, model = backend_config or EngineConfig(), model_path if model is None else model
    path = hub.resolve(None if model is None else str(model), config.revision, config.download_dir)
    with checkpoint.open(path) as source:  # text first: it is quick, and weights without a tokenizer are of no use
        tokenizer = Tokenizer.load(source)
        template = ChatTemplate.for_model(source.config, tokenizer, chat_template_config, meta_instruction, capability)
    from jaxserve.engine.loading import load

    with stages(show_progress) as progress:  # the vocabulary for grammars is made when one is first asked for
        engine = load(str(path), config, report=report, progress=progress, guide=lambda: made.author.table)
    made: Pipeline = Pipeline(engine, tokenizer, template, config.seed)
    return made


class Pipeline:
    """Answers prompts with one loaded model.  Threads may share it; `close` or a with-statement ends it."""

    def __init__(self, engine, tokenizer, template, seed: int | None = None):
        from jaxserve.reply import Author
        from jaxserve.text.tokenizer import stop_ids, stop_strings

        self.engine, self.tokenizer, self.template = engine, tokenizer, template
        self.session_len = engine.session_len
        self.generation_config = engine.generation_config  # what the model's authors recommend; `chat` follows it
        ends = stop_ids(tokenizer, engine.generation_config, template)
        self.author = Author(tokenizer, self.session_len, ends, stop_strings(tokenizer, template), seed)
        self.window = max(4 * engine.max_batch_size, 64)  # requests handed to the engine at once

    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt],
        gen_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        do_preprocess: bool = True,
        adapter_name: None = None,
        use_tqdm: bool | None = None,
    ) -> Response | list:
        """Answers one prompt with a Response, and a list of them with a list in the same order.

        A prompt is a text, a list of OpenAI messages, or a list of token ids; do_preprocess=False takes texts as they
        are, without a chat template.  gen_config: one for all, or a list of one each; None is greedy.  With n > 1 the
        answer to a prompt is itself a list of n.  A prompt that leaves no room for an answer gets finish_reason
        "length" and no tokens.  use_tqdm: a progress bar; None: for lists, on a terminal.
        """
        from jaxserve.progress import bar

        _no_adapter(adapter_name)
        prompts, single = _listed(prompts)
        configs = _one_each(gen_config, len(prompts))
        answers: list[list[Response]] = [[] for _ in prompts]
        shown = use_tqdm if single is False or use_tqdm else False
        with (
            bar(sum(config.n for config in configs), shown, unit=" answers") as progress,
            closing(self.drive(self._replies(prompts, configs, do_preprocess))) as news,
        ):
            for reply, _ in news:
                if reply.finished:
                    answers[reply.whole.index].append(reply.whole)
                    progress.update()
        results: list = []
        for config, answer in zip(configs, answers, strict=True):
            answer.sort(key=lambda response: response.choice)
            results.append(answer[0] if config.n == 1 else answer)
        return results[0] if single else results

    infer = __call__  # LMDeploy's other name of it

    def stream_infer(
        self,
        prompts: Prompt | Sequence[Prompt],
        gen_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        do_preprocess: bool = True,
        adapter_name: None = None,
    ) -> Generator[Response]:
        """Yields the answers piece by piece, as they come: `index` says of which prompt, `choice` which of its n.

        `text`, `token_ids` and `logprobs` are what is new; the last piece of an answer has a finish_reason.  Closing
        the generator aborts what still runs.
        """
        _no_adapter(adapter_name)
        prompts, _ = _listed(prompts)
        configs = _one_each(gen_config, len(prompts))
        return self._stream(prompts, configs, do_preprocess)

    def _stream(self, prompts, configs, do_preprocess):
        with closing(self.drive(self._replies(prompts, configs, do_preprocess, live=True))) as news:
            for _, delta in news:
                yield delta

    def session(self, gen_config: GenerationConfig | None = None) -> Session:
        """A new conversation."""
        return Session(self, gen_config)

    def chat(
        self,
        prompt: str,
        session: Session | None = None,
        gen_config: GenerationConfig | None = None,
        stream_response: bool = False,
    ) -> Session | Generator[Response]:
        """One turn of a conversation: returns the session (a new one if none is given) with `history` and `response`.

        stream_response=True returns the pieces of the answer in place of the session.
        """
        session = session or self.session()
        if stream_response:
            return session.stream(prompt, gen_config)
        session(prompt, gen_config)
        return session

    def get_ppl(self, input_ids: Sequence[Prompt] | Prompt) -> list[float]:
        """The mean cross entropy (natural logarithm, not its exponential) of each text's or sequence's tokens, given
        those before them: the logarithm of the perplexity, as in LMDeploy.  Texts are not put into a chat template."""
        prompts, _ = _listed(input_ids)
        sequences = [self.tokens(prompt, do_preprocess=False) for prompt in prompts]
        for tokens in sequences:
            if len(tokens) < 2:
                raise ValueError(f"a perplexity needs two tokens or more, not {len(tokens)}")
        return [-float(self.engine.score(tokens, want="logprobs").mean()) for tokens in sequences]

    def get_logits(self, input_ids: Sequence[Prompt] | Prompt):
        """The logits at every position of each sequence: numpy float32[sequences, longest, vocabulary], ended by zeros.

        Row i of a sequence is what the model makes of its tokens up to and including i.
        """
        import numpy as np

        prompts, _ = _listed(input_ids)
        rows = [self.engine.score(self.tokens(p, do_preprocess=False), want="logits") for p in prompts]
        longest = max(map(len, rows), default=0)
        return np.stack([np.pad(part, ((0, longest - len(part)), (0, 0))) for part in rows])

    def tokens(self, prompt: Prompt, do_preprocess: bool = True, **variables) -> list[int]:
        """The token ids that a prompt becomes; variables: for the chat template.  ValueError says what is wrong."""
        if isinstance(prompt, str):
            if not do_preprocess:
                return self.tokenizer.encode(prompt)
            prompt = [{"role": "user", "content": prompt}]
        if _are_ids(prompt):
            size, ids = self.engine.config.vocab, list(map(operator.index, prompt))  # type: ignore[arg-type]
            for token in ids:
                if not 0 <= token < size:
                    raise ValueError(f"token ids of this model are 0 to {size - 1}, not {token}")
            return ids
        return self.template.encode(prompt, **variables)

    def drive(self, source) -> Generator[tuple[Reply, Response]]:
        """Runs the replies of an iterator; see `jaxserve.reply.drive`."""
        from jaxserve.reply import drive

        return drive(self.engine, source, self.window)

    def _replies(self, prompts, configs, do_preprocess, live=False):
        for index, (prompt, config) in enumerate(zip(prompts, configs, strict=True)):
            yield from self.author.replies(self.tokens(prompt, do_preprocess), config, index=index, live=live)

    def close(self) -> None:
        """Frees the device; what still runs is aborted.  Closing twice is fine."""
        self.engine.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Session:
    """A conversation: `history` is a list of (prompt, answer), `response` the last answer.  One thread at a time."""

    def __init__(self, pipe: Pipeline, gen_config: GenerationConfig | None = None):
        self.history: list[tuple[str, str]] = []
        self.response: Response | None = None
        self._pipe = pipe
        self._gen_config = gen_config

    def __call__(self, prompt: str, gen_config: GenerationConfig | None = None) -> Response:
        """One turn, answered when it is complete."""
        for _ in self.stream(prompt, gen_config):
            pass
        assert self.response is not None
        return self.response

    def stream(self, prompt: str, gen_config: GenerationConfig | None = None) -> Generator[Response]:
        """One turn, piece by piece.  Closing it early ends the answer, and what there is of it stays in the history.

        A turn that has no room in the session, or fails, leaves the history as it was.
        """
        from jaxserve.reply import Response

        (config,) = _one_each(gen_config or self._gen_config, 1)
        if config.n != 1:
            raise ValueError(f"n is 1 in a conversation, not {config.n}")
        tokens = self._pipe.tokens(self.messages(prompt))
        self.response = whole = Response("", 0, len(tokens))
        return self._turn(prompt, tokens, config, whole)

    def _turn(self, prompt, tokens, config, whole):
        source = self._pipe.author.replies(tokens, config, live=True)
        reply = None
        try:
            with closing(self._pipe.drive(source)) as news:
                for reply, delta in news:  # noqa: B007  looked at when all is over, or the caller leaves
                    yield delta
        finally:
            if reply is not None:
                self.response = whole = reply.whole
            if whole.finish_reason is None:
                whole.finish_reason = "abort"
            if whole.finish_reason != "error" and whole.token_ids:
                self.history.append((prompt, whole.text))

    def messages(self, prompt: str) -> list[dict]:
        """The conversation so far with one more question, as OpenAI messages."""
        told = []
        for question, answer in self.history:
            told += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*told, {"role": "user", "content": prompt}]

    def close(self) -> None:
        """Forgets the conversation.  (Its cached pages are given up by themselves when others need them.)"""
        self.history.clear()
        self.response = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _are_ids(prompt) -> bool:
    return isinstance(prompt, list | tuple) and all(hasattr(token, "__index__") for token in prompt)


def _listed(prompts) -> tuple[list, bool]:
    """A list of prompts, and whether what came was a single one."""
    if isinstance(prompts, str):
        return [prompts], True
    if isinstance(prompts, tuple) and any(isinstance(part, str) for part in prompts):
        raise ValueError("a tuple is a text with images, and models with a vision part are not there yet")
    if not isinstance(prompts, Iterable):
        raise ValueError(f"a prompt is a text, a list of messages or of token ids, not {prompts!r}")
    prompts = list(prompts)
    if prompts and (isinstance(prompts[0], dict) or _are_ids(prompts)):
        return [prompts], True
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, tuple) and not _are_ids(prompt):
            raise ValueError(f"prompt {index} is a text with images; models with a vision part are not there yet")
        if not isinstance(prompt, str | list | tuple):
            raise ValueError(f"prompt {index} is a text, a list of messages or of token ids, not {prompt!r}")
    return prompts, False


def _one_each(gen_config, count: int) -> list[GenerationConfig]:
    if gen_config is None or isinstance(gen_config, GenerationConfig):
        return [gen_config or GenerationConfig()] * count
    configs = list(gen_config) if isinstance(gen_config, list | tuple) else [gen_config]
    for config in configs:
        if not isinstance(config, GenerationConfig):
            raise ValueError(f"gen_config is a GenerationConfig, not {config!r}")
    if len(configs) != count:
        raise ValueError(f"{len(configs)} generation configs came with {count} prompts: give one, or one each")
    return configs


def _no_adapter(name) -> None:
    if name is not None:
        raise ValueError(f"adapter_name={name!r}: LoRA adapters are not there yet; merge them into the checkpoint")
