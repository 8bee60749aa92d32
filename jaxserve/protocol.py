"""OpenAI's request bodies to prompts and a GenerationConfig, and Responses to OpenAI's answers.  Does no IO.

LMDeploy's extra parameters are understood too.  What a body leaves open is the model's: its generation_config.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxserve.config import GenerationConfig

if TYPE_CHECKING:
    from jaxserve.reply import Response

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat's answer may be as long as fits

# Parameters that are fields of GenerationConfig: OpenAI's name -> ours.
SAME = (
    *("n", "temperature", "top_p", "top_k", "min_p", "logit_bias", "ignore_eos", "min_new_tokens"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "bad_words", "bad_token_ids", "stop_token_ids"),
    *("skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"),
)
FIELDS = {name: name for name in SAME} | {
    "stop": "stop_words",
    "seed": "random_seed",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
}
# Parameters that do not bear on the answer.
IGNORED = {
    *("model", "user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key"),
    *("prompt_cache_retention", "safety_identifier", "stream_options", "session_id"),
}
# Parameters with a value that asks for nothing: name -> (such values, what stands against others).
NEUTRAL: dict[str, tuple[tuple, str]] = {
    "stream": ((False,), "answers of a batch are not streamed"),
    "tools": (([],), "tools are not there yet"),
    "functions": (([],), "tools are not there yet"),
    "tool_choice": (("none", "auto"), "tools are not there yet"),
    "response_format": (({"type": "text"},), "guided decoding is not there yet"),
    "modalities": ((["text"],), "models answer with text"),
    "audio": ((), "models answer with text"),
    "echo": ((False,), "prompts are not repeated"),
    "suffix": (("",), "filling in the middle is not there"),
    "adapter_name": ((), "LoRA adapters are not there yet"),
}


@dataclass(frozen=True)
class Ask:
    """What a body asks for.  prompts: one conversation, or the prompts of a completion."""

    chat: bool
    prompts: list
    do_preprocess: bool
    config: GenerationConfig
    variables: dict = field(default_factory=dict)  # for the chat template

    @classmethod
    def parse(cls, url, body, advice: dict | None = None, **defaults) -> Ask:
        """advice: the model's generation_config.json.  defaults: of GenerationConfig's fields.

        ValueError names the parameter that cannot be used.
        """
        if url not in (CHAT, COMPLETION):
            raise ValueError(f"url: {CHAT} and {COMPLETION} are answered, not {url!r}")
        if not isinstance(body, dict):
            raise ValueError(f"body is an object, not {body!r:.80}")
        given = {name: value for name, value in body.items() if value is not None}
        chat = url == CHAT
        if chat:
            prompts, do_preprocess = _messages(given)
        else:
            prompts, do_preprocess = _prompts(given), False
        variables = given.pop("chat_template_kwargs", {})
        if not isinstance(variables, dict):
            raise ValueError(f"chat_template_kwargs is an object, not {variables!r:.80}")
        if "enable_thinking" in given:
            variables = {"enable_thinking": given.pop("enable_thinking"), **variables}
        return cls(chat, prompts, do_preprocess, _config(given, chat, advice or {}, defaults), variables)


def _messages(given: dict) -> tuple[list, bool]:
    messages = given.pop("messages", None)
    if messages is None:
        raise ValueError("messages is missing")
    if not isinstance(messages, str | list) or not messages:
        raise ValueError(f"messages is a list of at least one message, not {messages!r:.80}")
    return [messages], not isinstance(messages, str)  # a text is a whole prompt, as in LMDeploy


def _prompts(given: dict) -> list:
    prompt = given.pop("prompt", None)
    if _is_prompt(prompt):
        return [prompt]
    if isinstance(prompt, list) and prompt and all(map(_is_prompt, prompt)):
        return prompt
    raise ValueError(
        "prompt is missing"
        if prompt is None
        else f"prompt is a text, a list of texts, or one or several lists of token ids, not {prompt!r:.80}"
    )


def _is_prompt(value) -> bool:
    """Whether it is a text, or token ids."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(token, int) and not isinstance(token, bool) for token in value)
    return isinstance(value, str)


def _config(given: dict, chat: bool, advice: dict, defaults: dict) -> GenerationConfig:
    wanted = dict(defaults) if chat else {"max_new_tokens": COMPLETION_TOKENS, **defaults}
    logprobs, alternatives = given.pop("logprobs", None), given.pop("top_logprobs", None)
    if given.pop("best_of", (count := given.get("n", 1))) != count:
        raise ValueError("best_of is not there; n answers are all returned")
    for name, value in given.items():
        if name in FIELDS:
            wanted[FIELDS[name]] = value
        elif name in NEUTRAL:
            values, reason = NEUTRAL[name]
            if value not in values:
                raise ValueError(f"{name}: {reason}")
        elif name not in IGNORED:
            raise ValueError(f"{name} is no parameter that is known here")
    if chat:
        if not isinstance(logprobs, bool | None):
            raise ValueError(f"logprobs is true or false, not {logprobs!r:.80}")
        if alternatives and not logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        wanted["logprobs"] = (0 if alternatives is None else alternatives) if logprobs else None
    elif logprobs is not None and logprobs is not False:
        wanted["logprobs"] = logprobs
    wanted.setdefault("max_new_tokens", None)
    if not {"temperature", "top_k", "top_p"} & wanted.keys() or "top_k" in {*wanted, *advice}:
        return GenerationConfig.from_hf(advice, **wanted)
    return GenerationConfig.from_hf(advice, top_k=0, **wanted)  # in OpenAI's sense: no bound but top_p


def answer(ask: Ask, responses: list[Response], tokenizer, *, model: str, id: str, created: int) -> dict:
    """The body of OpenAI's answer; responses: to each prompt its n, in order."""
    choice = _chat_choice if ask.chat else _completion_choice
    prompt_tokens = sum(response.input_token_len for response in responses if response.choice == 0)
    completion_tokens = sum(response.generate_token_len for response in responses)
    return {
        "id": id,
        "object": "chat.completion" if ask.chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [choice(index, response, tokenizer) for index, response in enumerate(responses)],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def error(message: str, *, type: str = "invalid_request_error", code: str | None = None) -> dict:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": type, "param": None, "code": code}}


def _chat_choice(index: int, response: Response, tokenizer) -> dict:
    logprobs = None
    if response.logprobs is not None:
        logprobs = {"content": [_chances(chances, tokenizer) for chances in response.logprobs], "refusal": None}
    return {
        "index": index,
        "message": {"role": "assistant", "content": response.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": response.finish_reason,
    }


def _completion_choice(index: int, response: Response, tokenizer) -> dict:
    logprobs = None
    if response.logprobs is not None:
        taken = [next(iter(chances.items())) for chances in response.logprobs]
        texts = [_text(token, tokenizer) for token, _ in taken]
        offsets = [0]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        logprobs = {
            "tokens": texts,
            "token_logprobs": [chance for _, chance in taken],
            "top_logprobs": [
                {_text(token, tokenizer): chance for token, chance in chances.items()} for chances in response.logprobs
            ],
            "text_offset": offsets[:-1],
        }
    return {"index": index, "text": response.text, "logprobs": logprobs, "finish_reason": response.finish_reason}


def _chances(chances: dict[int, float], tokenizer) -> dict:
    """One token's log-probability and its alternatives, the likeliest first."""
    token, chance = next(iter(chances.items()))
    others = sorted(chances.items(), key=lambda pair: -pair[1])
    return _chance(token, chance, tokenizer) | {"top_logprobs": [_chance(*pair, tokenizer) for pair in others]}


def _chance(token: int, chance: float, tokenizer) -> dict:
    return {"token": _text(token, tokenizer), "logprob": chance, "bytes": list(_bytes(token, tokenizer))}


def _bytes(token: int, tokenizer) -> bytes:
    return tokenizer.token_bytes[token] if token < tokenizer.vocab_size else b""


def _text(token: int, tokenizer) -> str:
    return _bytes(token, tokenizer).decode("utf-8", "replace")
