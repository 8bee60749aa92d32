"""Responses to the bodies of OpenAI's answers: choices, log-probabilities, usage.  Does no IO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.reply import Response


def error(message: str, *, type: str = "invalid_request_error", param: str | None = None, code=None) -> dict:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def usage(prompt: int, completion: int, cached: int = 0, reasoning: int | None = None) -> dict:
    """Counts of tokens."""
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    if reasoning is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return counts


def answer(ask, responses: list[Response], tokenizer, *, model: str, id: str, created: int) -> dict:
    """The body of the answer to a protocol.Ask; responses: to each prompt its n, in order."""
    choices: list[dict]
    if ask.chat:
        choices = [
            _chat_choice(index, response, ask.config.logprobs, tokenizer) for index, response in enumerate(responses)
        ]
    else:
        choices = [_completion_choice(index, response, tokenizer) for index, response in enumerate(responses)]
    firsts = [response for response in responses if response.choice == 0]
    return {
        "id": id,
        "object": "chat.completion" if ask.chat else "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage(
            sum(response.input_token_len for response in firsts),
            sum(response.generate_token_len for response in responses),
            sum(response.cached_tokens for response in firsts),
        ),
    }


def _chat_choice(index: int, response: Response, most: int | None, tokenizer) -> dict:
    return {
        "index": index,
        "message": {"role": "assistant", "content": response.text, "refusal": None},
        "logprobs": chat_logprobs(response.logprobs, most, tokenizer),
        "finish_reason": response.finish_reason,
    }


def _completion_choice(index: int, response: Response, tokenizer) -> dict:
    logprobs = None if response.logprobs is None else completion_logprobs(response.logprobs, tokenizer)
    return {"index": index, "text": response.text, "logprobs": logprobs, "finish_reason": response.finish_reason}


def chat_logprobs(chances: list[dict] | None, most: int | None, tokenizer) -> dict | None:
    """A chat's logprobs; chances: a token {id: log-probability}, the one taken first.  most: alternatives told."""
    if chances is None:
        return None
    return {"content": [_chances(row, most or 0, tokenizer) for row in chances], "refusal": None}


def completion_logprobs(chances: list[dict], tokenizer, start: int = 0) -> dict:
    """A completion's logprobs; chances as above, None for what was not computed; start: the characters before.

    An alternative that prints like a likelier one is left out, as they are told by what they print.
    """
    texts, own, others, offsets = [], [], [], []
    for row in chances:
        token, chance = next(iter(row.items()))
        text = token_text(token, tokenizer)
        texts.append(text)
        own.append(chance)
        offsets.append(start)
        start += len(text)
        printed: dict[str, float] = {}
        for other, value in _likeliest(row) if chance is not None else ():
            printed.setdefault(token_text(other, tokenizer), value)
        others.append(printed if chance is not None else None)
    return {"tokens": texts, "token_logprobs": own, "top_logprobs": others, "text_offset": offsets}


def _likeliest(chances: dict[int, float]) -> list[tuple[int, float]]:
    return sorted(chances.items(), key=lambda pair: -pair[1])


def _chances(chances: dict[int, float], most: int, tokenizer) -> dict:
    """One token's log-probability and its alternatives, the likeliest first."""
    token, chance = next(iter(chances.items()))
    others = [_chance(*pair, tokenizer) for pair in _likeliest(chances)[:most]]
    return _chance(token, chance, tokenizer) | {"top_logprobs": others}


def _chance(token: int, chance: float, tokenizer) -> dict:
    data = token_bytes(token, tokenizer)
    return {"token": data.decode("utf-8", "replace"), "logprob": chance, "bytes": list(data)}


def token_bytes(token: int, tokenizer) -> bytes:
    """What a token prints, as bytes; b"" where the model's logits are wider than the vocabulary."""
    return tokenizer.token_bytes[token] if token < len(tokenizer.token_bytes) else b""


def token_text(token: int, tokenizer) -> str:
    """What a token prints; U+FFFD for a part of a character."""
    return token_bytes(token, tokenizer).decode("utf-8", "replace")
