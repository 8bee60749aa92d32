"""Models of all quantized formats on a GPU, through the whole engine."""

import numpy as np
import pytest

from tests import oracle
from tests.engine import build
from tests.quant.test_whole import NODES, ROUGH, linear, model

WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
WIDE |= {"intermediate_size": 512, "num_hidden_layers": 2}
KNOBS = {"cache_block_seq_len": 16, "num_tokens_per_iter": 64, "max_batch_size": 16}
KNOBS |= {"cache_max_entry_count": 100}
SIXTEEN = 0.03  # what roundings to 16 bits may make of the logits
EXPERTS = ("awq", "w8a8", "fp8-block", "gptq8")


def check(folder, kind, architecture, dtype, of):
    """of: what counts of the errors of tokens."""
    hf, values = model(folder, kind, architecture, **WIDE, moe_intermediate_size=128)
    prompt, most = [3 + 7 * i % 80 for i in range(48)], SIXTEEN + 3 * ROUGH.get(kind, 0)
    requests = [(prompt[:n], 24) for n in (1, 5, 20, 48)]
    with build.engine(folder, dtype=dtype, **KNOBS) as engine:
        layer = engine.runner.params.layers[0]
        assert {type(map_) for map_ in linear(layer).values()} == {NODES[kind]}
        found = engine.score(prompt, "logits")
        together = build.run(engine, requests)  # prompts in one step, then four rows
    want = oracle.logits(values, hf, prompt)
    assert of(np.linalg.norm(found - want, axis=-1) / np.linalg.norm(want, axis=-1)) < most
    for (start, count), tokens in zip(requests, together):
        assert len(tokens) == count or build.EOS in tokens
        likely = oracle.logits(values, hf, [*start, *tokens[:-1]])[len(start) - 1 :]
        gaps = likely.max(-1) - likely[np.arange(len(tokens)), tokens]  # to what the definition would choose
        assert of(gaps / np.abs(likely).max(-1)) < most


@pytest.mark.gpu
@pytest.mark.parametrize("kind", NODES)
def test_dense(tmp_path, kind):
    check(tmp_path, kind, "LlamaForCausalLM", "bfloat16", np.mean)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts(tmp_path, kind):
    """A rounding may choose another expert, so there are fewer of them, and a few tokens do not count."""
    check(tmp_path, kind, "MixtralForCausalLM", "float16", np.median)
