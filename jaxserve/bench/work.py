"""What the load asks for: files of conversations, random prompts, and the fixed work on which engines are compared."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Counter = Callable[[list[str]], list[int]]  # texts -> how many tokens each has

MIX_SEED, MIX_REQUESTS, MIX_CLIENTS = 1234, 1000, 256
SHORTEST, LONGEST_PROMPT, LONGEST = 4, 1024, 2048  # tokens; what benchmarks on ShareGPT keep
WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power
hour game line end member law car city name team minute idea body back parent face others level office door health
person art war history party result change morning reason research girl guy moment air teacher
""".split()  # noqa: SIM905


@dataclass
class Item:
    """One request: a prompt (text, token ids or messages) and how many tokens its answer has."""

    prompt: str | list
    output: int


def mix() -> list[Item]:
    """1000 requests of token ids, 16-1024 in, 16-512 out; meant for 256 clients.  The same at every call."""
    draw = random.Random(MIX_SEED)
    items = []
    for _ in range(MIX_REQUESTS):
        ids = [draw.randrange(1000, 40000) for _ in range(draw.randint(16, 1024))]
        items.append(Item(ids, draw.randint(16, 512)))
    return items


def made_up(
    count: int, inputs: tuple[int, int], outputs: tuple[int, int], seed: int, *, ids: tuple[int, int] | None
) -> list[Item]:
    """Random prompts with lengths from ranges.  ids: the range of token ids; None = words, a token each or so."""
    draw = random.Random(seed)
    items = []
    for _ in range(count):
        length = draw.randint(*inputs)
        prompt: str | list
        if ids is None:
            prompt = " ".join(draw.choice(WORDS) for _ in range(length))
        else:
            prompt = [draw.randint(*ids) for _ in range(length)]
        items.append(Item(prompt, draw.randint(*outputs)))
    return items


def conversations(
    path: str | Path, count: int, seed: int, counter: Counter | None, *, output: int | None = None
) -> list[Item]:
    """The first exchanges of a file, at most `count`, in random order.

    path: ShareGPT's JSON, or JSON lines with "prompt" and "reply" (or "output_len"), "messages" or "conversations".
    counter: counts tokens; then what ShareGPT benchmarks leave out is left out (under 4 tokens of prompt or answer,
    over 1024 of prompt or 2048 of both) and each answer gets the length of the one in the file.  Without it four
    characters count as a token.  output: the same length for all answers instead.
    """
    pairs = [pair for pair in read(path) if pair is not None]
    random.Random(seed).shuffle(pairs)
    items: list[Item] = []
    at, stride = 0, max(64, count)
    while len(items) < count and at < len(pairs):
        some = pairs[at : at + stride]
        at += stride
        prompts = [prompt if isinstance(prompt, str) else json.dumps(prompt) for prompt, _ in some]
        replies = [reply if isinstance(reply, str) else "" for _, reply in some]
        inputs, outputs = (tokens(texts, counter) for texts in (prompts, replies))
        for (prompt, reply), length, answer in zip(some, inputs, outputs):
            answer = output or (reply if isinstance(reply, int) else answer)
            if length >= SHORTEST and answer >= SHORTEST and length <= LONGEST_PROMPT and length + answer <= LONGEST:
                items.append(Item(prompt, answer))
    if not items:
        raise ValueError(f"{path} has no exchange that a benchmark keeps: 4 to 1024 tokens in, 4 or more out")
    return items[:count]


def tokens(texts: list[str], counter: Counter | None) -> list[int]:
    return counter(texts) if counter else [-(-len(text) // 4) for text in texts]


def read(path: str | Path) -> Iterator[tuple[str | list, str | int] | None]:
    """(prompt, answer or its length) of each entry of a file; None for an entry without an exchange."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        entries = json.loads(text) if text.lstrip().startswith("[") else [json.loads(s) for s in text.splitlines() if s]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is neither JSON nor JSON lines: {error}") from error
    for entry in entries:
        yield exchange(entry) if isinstance(entry, dict) else None


def exchange(entry: dict) -> tuple[str | list, str | int] | None:
    """The first question of an entry and its answer, in any of the spellings that such files have."""
    if isinstance(turns := entry.get("conversations") or entry.get("conversation"), list) and len(turns) > 1:
        first, second = [turn.get("value") or turn.get("content") or "" for turn in turns[:2]]
        return first, second
    if isinstance(messages := entry.get("messages"), list) and messages:
        if messages[-1].get("role") == "assistant":
            return messages[:-1], str(messages[-1].get("content") or "")
        return messages, int(entry.get("output_len") or entry.get("max_tokens") or 0)
    if prompt := entry.get("prompt"):
        length = entry.get("output_len") or entry.get("output_tokens")
        return prompt, int(length) if length else str(entry.get("reply") or entry.get("completion") or "")
    return None


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds at which requests arrive, `rate` a second on average.

    burstiness: 1 = a Poisson process; less comes in bursts, more is steadier (the shape of a gamma distribution).
    """
    draw, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(now)
        now += draw.gammavariate(burstiness, 1 / (rate * burstiness))
    return times
