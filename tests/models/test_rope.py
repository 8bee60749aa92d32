import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.cache import Spans
from jaxserve.models import rope
from jaxserve.models.config import Rope, from_hf
from scripts import tiny_checkpoint

GOLDEN = json.loads((Path(__file__).parents[1] / "data/families/rope.json").read_text())


def config(**changes):
    return from_hf(tiny_checkpoint.config("LlamaForCausalLM", **changes))


@pytest.mark.parametrize("name", GOLDEN)
def test_frequencies_equal_transformers(name):
    hf, length = GOLDEN[name]["config"], GOLDEN[name]["length"]
    cfg = config(**{"head_dim": None} | hf)
    inv_freq, scale = rope.table(cfg.rope, cfg.head_dim)
    if cfg.rope.kind == "dynamic":
        inv_freq = rope.dynamic(cfg.rope, cfg.head_dim, jnp.array([length]))[0]
    assert inv_freq.dtype == np.float32
    np.testing.assert_allclose(inv_freq, GOLDEN[name]["inv_freq"], rtol=1e-6)  # theirs are computed in float32
    assert scale == pytest.approx(GOLDEN[name]["scale"], rel=1e-12)


def test_dynamic_base_grows_only_past_the_original_length():
    kind = Rope(1e6, "dynamic", 2.0, 32768)
    plain = rope.table(kind, 128)[0]
    got = rope.dynamic(kind, 128, jnp.array([1, 32768, 65536]))
    np.testing.assert_array_equal(got[0], plain)
    np.testing.assert_array_equal(got[1], plain)
    base = 1e6 * 3 ** (128 / 126)  # factor * 2 - (factor - 1)
    np.testing.assert_allclose(got[2], base ** (-np.arange(0, 128, 2) / 128), rtol=5e-7)


def test_yarn_keeps_fast_planes_and_interpolates_slow_ones():
    kind = Rope(1e4, "yarn", factor=8.0, original=2048)
    ratio = rope.table(kind, 128)[0] / rope.table(Rope(1e4), 128)[0]
    turns = 2048 * rope.table(Rope(1e4), 128)[0] / (2 * math.pi)
    np.testing.assert_allclose(ratio[turns > 33], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.9], 1 / 8, rtol=1e-6)
    assert np.all(np.diff(ratio) <= 1e-7)


def test_yarn_attention_factor_of_the_config_wins():
    kind = Rope(1e4, "yarn", factor=8.0, original=2048, attention_factor=0.5, mscale=1.0, mscale_all_dim=2.0)
    assert rope.table(kind, 64)[1] == 0.5


def test_rotation_turns_every_plane_by_position_times_frequency():
    cfg = config(rope_theta=100.0)
    spans = Spans.locate(5, *(jnp.array([n]) for n in (3, 5)), jnp.zeros((1, 1), jnp.int32), jnp.array([8]))
    angle = np.outer(3 + np.arange(5), 100.0 ** (-np.arange(8) / 8))
    np.testing.assert_allclose(rope.rotation(cfg, spans), (np.cos(angle), np.sin(angle)), rtol=1e-5, atol=1e-6)


def test_rotation_is_computed_in_float32():
    cfg = config()
    spans = Spans.locate(2, jnp.array([100001]), jnp.array([2]), jnp.zeros((1, 1), jnp.int32), jnp.array([8]))
    cos, sin = rope.rotation(cfg, spans)
    assert cos.dtype == sin.dtype == jnp.float32


def test_rows_of_a_batch_keep_their_own_base():
    cfg = config(max_position_embeddings=16, rope_scaling={"type": "dynamic", "factor": 2.0})
    start, count, rope_len = jnp.array([0, 20]), jnp.array([2, 2]), jnp.array([8, 40])
    spans = Spans.locate(4, start, count, jnp.zeros((2, 1), jnp.int32), rope_len)
    cos, _ = rope.rotation(cfg, spans)
    per_row = rope.dynamic(cfg.rope, 16, rope_len)
    np.testing.assert_allclose(cos[1], jnp.cos(per_row[0]), rtol=1e-6)
    np.testing.assert_allclose(cos[3], jnp.cos(21 * per_row[1]), rtol=1e-5)
    assert not np.allclose(per_row[0], per_row[1])
