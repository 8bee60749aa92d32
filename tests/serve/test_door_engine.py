"""The door before a real engine with a tiny model."""

import random
import time

import pytest

from jaxserve.engine.request import Overloaded, Request
from jaxserve.serve.door import Door
from tests.engine import build
from tests.serve.test_door import Sink, settled


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    build.tiny_checkpoint.write(folder, build.HF)
    with build.engine(folder) as engine, Door(engine, max_queued=8) as door:
        yield door


def test_everything_returns(door):
    """Random lengths, aborts and refusals, with preemptions; what is counted agrees with the engine."""
    draw, open_ones, refused = random.Random(0), [], 0
    for _ in range(120):
        prompt = [draw.randrange(build.VOCAB) for _ in range(draw.randint(1, 60))]
        request = Request(prompt, draw.randint(1, 30), outbox=Sink())
        outbox = request.outbox
        try:
            door.submit(request)
        except Overloaded:
            refused += 1
            time.sleep(0.02)
            continue
        open_ones.append((request, outbox))
        if draw.random() < 0.3:
            door.abort(draw.choice(open_ones)[0])
    for _, outbox in open_ones:
        outbox.wait()
    settled(door)
    meter, stats = door.meter, door.stats()
    assert meter.ended["abort"] and meter.ended["length"] and not meter.ended["error"]
    assert sum(meter.ended.values()) == len(open_ones) and meter.rejected["requests"] == refused > 0
    assert meter.tokens == stats["generated_tokens"]
    assert sum(meter.queue.counts) >= sum(meter.prefill.counts) >= meter.ended["length"]
    assert sum(meter.step.counts) and meter.step.sum == pytest.approx(stats["step_tokens"], rel=0.2)


def test_times_add_up(door):
    """A lone request: queue, prefill and decode are its whole time."""
    names = ("queue", "prefill", "decode", "total", "first")
    before = {name: getattr(door.meter, name).sum for name in names}
    request = Request([1, 2, 3] * 10, 20, outbox=Sink())
    outbox = request.outbox
    door.submit(request)
    outbox.wait()
    took = {name: getattr(door.meter, name).sum - before[name] for name in names}
    assert took["queue"] + took["prefill"] == pytest.approx(took["first"], abs=1e-6)
    assert took["first"] + took["decode"] == pytest.approx(took["total"], abs=0.01)
    assert all(value > 0 for value in took.values())
    assert sum(door.meter.gap.counts) >= 19


def test_scores_pass(door):
    assert door.score([1, 2, 3]).shape == (2,)
    settled(door)
