"""Rows 47 to 51, 72, 73 and 75: clients that leave, do not read or come all at once; answers that must not mix."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from random import Random

from tests.serve.faults.row import Row, fault
from tests.serve.faults.target import WAIT, Reply, Target, first, many

BESIDE = 4  # streams that may run beside a row
LEFT = 0.1  # seconds in which a request ends whose client has left


def until(target: Target, condition: Callable[[dict], bool], seconds: float) -> float | None:
    """How long it took /metrics to say so; None: it did not."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        load = target.load()
        if load is not None and condition(load):
            return time.monotonic() - began
        time.sleep(0.005)
    return None


def _inside(target: Target) -> int:
    load = target.load()
    return round(load["running"] + load["waiting"]) if load else 0


def _freed(target: Target, what: str, left: int = BESIDE) -> str | None:
    """What is wrong if those who left are not gone in time; left: who may still be there."""
    longest = 20 * LEFT * target.slack
    took = until(target, lambda load: load["running"] + load["waiting"] <= left, longest)
    target.took.append(longest if took is None else took)
    if took is None or took > LEFT * target.slack:
        return f"{what}: {target.load()} after {target.took[-1]:.2f} s"
    return None


def _unknown(target: Target) -> str | None:
    return None if target.load() else "/metrics does not tell how many requests run"


def _long(target: Target, **more) -> dict:
    """A request that does not end by itself, as far as the context goes."""
    most = min(2000, (target.context or 4096) // 2)
    return {"max_tokens": most, "ignore_eos": True, "min_tokens": most} | more


def leave_early(target: Target, clients: int = 100) -> Iterator[str | None]:
    if unknown := _unknown(target):
        yield unknown
        return
    open_ones = many(lambda i: target.open(prompt=f"Count from {i}.", **_long(target)), clients)
    heads = many(lambda i: first(open_ones[i]), clients)
    if bad := [head for head in heads if b" 200 " not in head[:16]]:
        yield f"{len(bad)} of {clients} did not begin: {bad[0][:100]!r}"
    for client in open_ones:
        client.close()
    yield _freed(target, f"{clients} clients left after their first chunk")


def leave_queued(target: Target) -> Iterator[str | None]:
    """While they wait behind others, or in their prefill: before any token."""
    if unknown := _unknown(target):
        yield unknown
        return
    ahead = many(lambda i: target.open(prompt=f"Count from {i}.", **_long(target)), QUEUE)
    until(target, lambda load: load["running"] + load["waiting"] >= QUEUE, 10)
    before = _inside(target)
    prompt = "a " * min(2000, (target.context or 4096) // 4)
    queued = many(lambda i: target.open(prompt=f"{i} {prompt}", **_long(target, stream=i % 2 == 0)), 20)
    until(target, lambda load: load["waiting"] > BESIDE, 0.5)  # it may be quicker than that
    for client in queued:
        client.close()
    yield _freed(target, "20 clients left before a token", before + BESIDE)
    for client in ahead:
        client.close()
    yield _freed(target, "those before them")


QUEUE = 24  # requests that are ahead of those that leave


def slow_reader(target: Target, seconds: float = 3) -> Iterator[str | None]:
    """One byte a second, while others go on; what waits for it is bounded."""
    before = target.memory() if target.memory else 0
    with target.open(small=True, **_long(target, logprobs=5)) as client:
        for _ in range(round(seconds)):
            if not client.recv(1):
                break
            if wrong := target.alive():
                yield f"beside a slow reader: {wrong}"
            time.sleep(1)
        if target.memory and target.memory() > before + (64 << 20):
            yield f"memory grew by {target.memory() - before >> 20} MiB"


def reset(target: Target) -> Iterator[str | None]:
    if unknown := _unknown(target):
        yield unknown
        return
    some = [target.open(prompt=f"Count from {i}.", **_long(target, stream=False)) for i in range(8)]
    if until(target, lambda load: load["running"] + load["waiting"] >= 8, 10) is None:
        yield f"8 requests do not run: {target.load()}"
    for client in some:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # closing it sends RST
        client.close()
    yield _freed(target, "8 connections were reset")


def burst(target: Target, limit: int) -> Iterator[str | None]:
    """Four times as many as are let in, at once: the excess is told so, the others are answered whole."""
    ready, inside, over = threading.Barrier(4 * limit), [0], threading.Event()

    def ask(index):
        ready.wait(WAIT)
        return target.complete(prompt=f"Count from {index}.", max_tokens=50, ignore_eos=True, min_tokens=50)

    def count():
        while not over.wait(0.02):
            inside.append(_inside(target))

    counting = threading.Thread(target=count, daemon=True)
    counting.start()
    replies = many(ask, 4 * limit, 4 * limit)
    over.set()
    counting.join(WAIT)
    whole = [reply for reply in replies if reply.status == 200]
    yield from (_refusal(target, reply) for reply in replies if reply.status != 200)
    # Where clients come slowly, seats are taken twice, and so more than `limit` may be answered; never at once.
    if len(whole) < limit // 2 or max(inside) > limit:
        yield f"{len(whole)} of {4 * limit} were answered, up to {max(inside)} at once, and {limit} are let in"
    if short := [reply for reply in whole if reply.json()["usage"]["completion_tokens"] != 50]:
        yield f"{len(short)} answers were cut: {short[0]}"
    # How long a refusal takes, when not hundreds are told at the same moment.
    seats = many(lambda i: target.open(prompt=f"Count from {i}.", **_long(target)), limit)
    until(target, lambda load: load["running"] + load["waiting"] >= limit, 5)
    refused: list[Reply] = []
    while len(refused) < 20 and len(seats) < 2 * limit:
        if (reply := target.complete()).status != 200:
            refused.append(reply)
        else:  # one that ran beside has left its seat
            seats.append(target.open(prompt="Count from 0.", **_long(target)))
    for client in seats:
        client.close()
    if len(refused) < 20:
        yield f"{len(seats)} are let in, not {limit}"
        return
    yield from (_refusal(target, reply) for reply in refused)
    target.took.append(sorted(reply.seconds for reply in refused)[-2])
    if target.took[-1] > 0.05 * target.slack:
        yield f"a refusal took {target.took[-1]:.3f} s"
    yield _freed(target, "those in their seats")


def _refusal(target: Target, reply: Reply) -> str | None:
    if reply.status in (503, 429) and not reply.headers.get("retry-after", "").isdigit():
        return f"no Retry-After: {reply}"
    return fault(target, "the excess", reply, 503, 429)


def secrets(target: Target, count: int = 10_000) -> Iterator[str | None]:
    """Each prompt has a word of its own, a third of the clients leave: no answer has another's word."""
    draw = Random(7)
    words = [f"{draw.randrange(16**10):010x}" for _ in range(count)]

    def ask(index):
        prompt = f"The secret is {words[index]}. The secret is"
        if index % 3 == 0:
            with target.open(prompt=prompt, max_tokens=16) as client:
                return first(client).decode("utf-8", "replace") if index % 2 else ""
        reply = target.complete(prompt=prompt, max_tokens=16)
        return reply.text if reply.status == 200 else f"!{reply}"

    answers = many(ask, count, 32)
    if failed := [answer for answer in answers if answer.startswith("!")]:
        yield f"{len(failed)} of {count} failed: {failed[0]}"
    known = set(words)
    for index, answer in enumerate(answers):
        told = {answer[i : i + 10] for i in range(len(answer) - 9)} & known - {words[index]}
        if told:
            yield f"answer {index} has the secret of another: {answer!r}"


def seeds(target: Target) -> Iterator[str | None]:
    """The same seed, alone and among 64."""
    drawn = {"max_tokens": 12, "seed": 7, "temperature": 1.0}
    alone = [target.complete(prompt="A story:", **drawn) for _ in range(2)]
    for reply in alone:
        yield fault(target, "with a seed", reply, 200)
    among = many(lambda i: target.complete(prompt="A story:", **drawn), 64, 64)
    texts = {reply.text if reply.status == 200 else str(reply) for reply in [*alone, *among]}
    if len(texts) > 1:
        yield f"one seed, {len(texts)} answers: {sorted(texts)[:2]}"


class Watch:
    """/metrics, read all the while: counters that fall, texts that are none."""

    def __init__(self, target: Target, every: float = 0.5):
        self.target, self.every = target, every
        self.wrong: list[str] = []
        self.looks = 0
        self._latest: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self._stop.wait(self.every):
            self.look()

    def look(self) -> None:
        try:
            now = self.target.metrics()
        except ValueError as error:
            self.wrong.append(f"/metrics is no text for Prometheus: {error}")
            return
        except OSError:
            return
        self.looks += bool(now)
        for name, value in now.items():
            kind = name.partition("{")[0]
            if kind.endswith(("_total", "_count", "_bucket", "_sum")) and value < self._latest.get(name, value):
                self.wrong.append(f"{name} fell from {self._latest[name]} to {value}")
        self._latest = now

    def check(self, target: Target) -> Iterator[str | None]:
        """Row 75; it ends the watch."""
        self._stop.set()
        self._thread.join(WAIT)
        yield from self.wrong
        if not self.looks:
            yield "there are no metrics"
        elif until(target, lambda load: not any(load.values()), 10) is None:
            yield f"the gauges do not return to 0: {target.load()}"


ROWS = [
    Row(
        47,
        "close after the first chunk (100 clients)",
        "nothing runs after 100 ms",
        leave_early,
        tests=("serve/test_stream.py::test_a_client_that_leaves",),
    ),
    Row(
        48,
        "close while queued or in prefill",
        "ended in 100 ms",
        leave_queued,
        tests=("serve/test_stream.py::test_a_client_that_leaves_while_it_is_queued",),
    ),
    Row(
        49,
        "a client reads 1 byte/s",
        "bounded, others unaffected; given up in the end",
        slow_reader,
        tests=("serve/test_stream.py::test_a_client_that_does_not_read",),
    ),
    Row(
        50,
        "RST during a request that is not streamed",
        "ended",
        reset,
        tests=("serve/test_stream.py::test_a_reset_connection",),
    ),
    Row(51, "a burst of four times what is let in", "503 + Retry-After in 50 ms, others whole", None, "limit"),
    Row(
        72,
        "10 000 short requests with secrets, a third of which leave",
        "no leak",
        secrets,
        tests=(
            "serve/test_faults.py::test_72_answers_do_not_mix",
            "serve/test_faults_clients.py::test_72_every_answer_is_its_own",
            "serve/test_door.py::test_ten_thousand_of_everything",
        ),
    ),
    Row(
        73,
        "the same seed, alone and among 64",
        "identical",
        seeds,
        tests=("engine/test_engine.py::test_sampling_does_not_depend_on_the_batch",),
    ),
    Row(75, "/metrics during all of it", "parses, counters rise, gauges return to 0", None),
]
