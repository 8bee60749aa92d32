"""Which programs there are: enough for every step, few enough to compile."""

import dataclasses

import pytest

from jaxserve.engine.memory import MemoryPlan
from jaxserve.engine.sizes import Sizes, bucket

# 96 KiB of keys and values a token.
PLAN = MemoryPlan("GPU", 1, 139 << 30, 16 << 30, 8000 * 64 * 98304, 1 << 30, 64, 8001, 4096, 256, 4096)


def choose(platform="gpu", **changes):
    return Sizes.choose(platform, dataclasses.replace(PLAN, **changes))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(
    "lanes, budget", [(1, 1), (1, 64), (4, 16), (100, 300), (256, 4096), (1000, 1000), (512, 20000)]
)
def test_every_step_has_a_program(platform, lanes, budget):
    sizes = choose(platform, lanes=lanes, budget=budget)
    for some in (sizes.tokens, sizes.rows, sizes.pages, sizes.scored):
        assert some and list(some) == sorted(set(some))
    assert sizes.tokens[-1] == budget and sizes.rows[-1] >= lanes and set(sizes.scored) <= set(sizes.tokens)
    assert not sizes.whole or sizes.whole[-1] >= lanes
    assert bucket(-(-4096 // 64), sizes.pages)


def test_short_steps_share_launches():
    assert choose().bursts == ()  # 16 GiB of weights: a step takes 5 ms
    assert choose("cpu", weights=1 << 28).bursts == ()
    small = choose(weights=1_200_000_000)
    assert dict(small.bursts) == {2: 8, 8: 4, 16: 4, 32: 4, 64: 2}
    assert [small.steps(rows) for rows in (0, 1, 2, 9, 33, 64, 65, 256)] == [8, 8, 8, 4, 2, 2, 1, 1]
    assert dict(choose(weights=270_000_000, lanes=3).bursts) == {2: 8, 3: 8}
    alone = Sizes.choose("gpu", dataclasses.replace(PLAN, weights=1_200_000_000, lanes=8), 1)
    assert (dict(alone.bursts), alone.whole) == ({1: 8, 2: 8, 8: 4}, (1, 2, 4, 8))
    long = choose(weights=1_200_000_000, cache=PLAN.cache * 8)  # the same with eight times the keys and values
    assert dict(long.bursts) == {2: 4, 8: 2}
