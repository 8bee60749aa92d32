"""Experts in 4 bits, against a slow definition: token by token, expert by expert, scale by scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.lite import awq, awq_layout, calibrate, experts, rounding, scales
from tests.lite.test_calibrate import WINDOWS, opened

GROUP = 16


@pytest.fixture(scope="module", params=["Qwen3MoeForCausalLM", "MixtralForCausalLM"])
def block(request, tmp_path_factory):
    """A layer with experts; some of its inputs are much larger than others."""
    changes = {"mlp_only_layers": []} if "Qwen" in request.param else {}
    model, _ = opened(tmp_path_factory.mktemp("model"), request.param, **changes)
    block = next(calibrate.layers(model, WINDOWS))
    loud = np.exp(np.random.default_rng(1).standard_normal(model.cfg.width)).astype(np.float32)
    block.layer = block.layer.replace(norm2=block.layer.norm2 * loud)
    return block


def met(block):
    """Of each expert the tokens that it is given, and of all experts all of them."""
    x = np.concatenate([np.asarray(taken["ffn.gate_up"]) for taken in block.inputs("ffn.gate_up")])
    scores = np.asarray(x @ block.layer.ffn.router.weight)
    chosen = np.argsort(-scores, 1)[:, : block.cfg.experts_per_token]
    return x, [x[(chosen == expert).any(1)] for expert in range(block.cfg.experts)]


def inner(block, expert, x):
    gate, up = np.moveaxis(np.asarray(block.layer.ffn.gate_up.weight[expert]), 1, 0)
    return np.asarray(jax.nn.silu(x @ gate)) * (x @ up)


def test_what_comes_into_the_experts(block):
    seen, (x, of) = experts.look(block, block.layer), met(block)
    np.testing.assert_allclose(seen.moments, x.T @ x / len(x), rtol=1e-3, atol=1e-4)
    for found, parts in (
        (seen.gate_up, of),
        (seen.down, [inner(block, expert, part) for expert, part in enumerate(of)]),
    ):
        sums = np.stack([np.square(part).sum(0) for part in parts])
        counts = np.array([len(part) for part in parts])
        mean = sums.sum(0) / counts.sum()
        expected = (sums + experts.FEW * mean) / (counts + experts.FEW)[:, None]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_the_scale_of_all_experts_is_the_best_of_those_tried(block):
    seen, weights = experts.look(block, block.layer), np.asarray(block.layer.ffn.gate_up.weight)  # [E, D, 2, F]
    flat = jnp.moveaxis(weights, 0, 1)
    found = np.asarray(scales.search(flat, seen.moments, GROUP))
    (x, _), lost = met(block), {}
    act, size = np.sqrt(np.square(x).mean(0)), np.abs(weights).mean((0, 2, 3))
    for a, b in ((0.0, 0.0), *scales.POWERS):
        scale = act**a / size**b
        scale = np.clip(scale / np.sqrt(scale.max() * scale.min()), 1 / 64, 64)
        total = 0.0
        for weight in weights:
            weight = weight.reshape(len(weight), -1)
            power = np.square(x / scale).mean(0)
            rounded = np.asarray(rounding.clipped(jnp.asarray(weight * scale[:, None]), power, GROUP).values())
            total += np.square(x @ weight - (x / scale) @ rounded).sum()
        lost[a, b] = total, scale
    least, scale = min(lost.values(), key=lambda pair: pair[0])
    assert least < 0.99 * lost[0.0, 0.0][0]
    np.testing.assert_allclose(found, scale, rtol=1e-3)


@pytest.mark.parametrize("searched", [(), ("ffn.gate_up",), calibrate.MAPS], ids=["none", "norms", "all"])
def test_what_is_written_is_the_layer(block, searched):
    layer, tensors, errors = experts.quantized(block, block.layer, GROUP, False, searched)
    for before, after in zip(block.outputs(), block.outputs(layer)):
        np.testing.assert_allclose(after, before, atol=2e-3)  # scales alone change nothing
    assert all(error["found"] < error["nearest"] for error in errors.values())
    for path in ("ffn.gate_up", "ffn.down"):
        row, weights = block.rows[path], np.asarray(calibrate.at(layer, path).weight)
        for expert, weight in enumerate(weights):
            parts = [weight[:, 0], weight[:, 1]] if path == "ffn.gate_up" else [weight]
            for source, part in zip(row.sources, parts, strict=True):
                name = source.format(block.index, expert)
                step = np.repeat(np.asarray(tensors[f"{name}.scales"], np.float32), GROUP, 0)
                apart = np.abs(awq_layout.values(tensors, name) - part)
                assert (apart < 0.51 * step).mean() > 0.8  # the others are beyond where the range is cut
                assert np.linalg.norm(apart) < 0.12 * np.linalg.norm(part)


def test_scales_make_the_error_of_a_layer_smaller(block):
    lost = {}
    for search in awq.SEARCHES:
        tensors, about, *_ = awq.quantized(block, awq.Settings(GROUP, search=search), WINDOWS.size)
        layer = awq_layout.restored(block, tensors)
        apart = [found - exact for found, exact in zip(block.outputs(layer), block.outputs())]
        lost[search] = sum(float(jnp.square(part).sum()) for part in apart)
        assert about["errors"].keys() == set(calibrate.MAPS)
    assert lost["norms"] < lost["none"]
