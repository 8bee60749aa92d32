"""Models of all quantized formats on a GPU, through the whole engine."""

import numpy as np
import pytest

from tests import oracle
from tests.engine import build
from tests.quant.test_whole import NODES, ROUGH, linear, model

WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
WIDE |= {"intermediate_size": 512, "num_hidden_layers": 2}
KNOBS = {"dtype": "bfloat16", "cache_block_seq_len": 16, "num_tokens_per_iter": 64, "max_batch_size": 16}
KNOBS |= {"cache_max_entry_count": 100}
BFLOAT16 = 0.03  # what its roundings make of the logits
EXPERTS = [("MixtralForCausalLM", kind) for kind in ("awq", "w8a8", "fp8-block", "gptq8")]


def check(folder, kind, architecture):
    hf, values = model(folder, kind, architecture, **WIDE, moe_intermediate_size=128)
    prompt = [3 + 7 * i % 80 for i in range(48)]
    requests = [(prompt[:n], 24) for n in (1, 5, 20, 48)]
    with build.engine(folder, **KNOBS) as engine:
        layer = engine.runner.params.layers[0]
        assert {type(map_) for map_ in linear(layer).values()} == {NODES[kind]}
        found = engine.score(prompt, "logits")
        together = build.run(engine, requests)  # prompts in one step, then four rows
        assert all(len(tokens) == count or build.EOS in tokens for (_, count), tokens in zip(requests, together))
    want = oracle.logits(values, hf, prompt)
    assert np.linalg.norm(found - want) / np.linalg.norm(want) < BFLOAT16 + 3 * ROUGH.get(kind, 0)
    for (start, _), tokens in zip(requests, together):  # each is among the likeliest, as the definition sees it
        known = [*start, *tokens]
        likely = oracle.logits(values, hf, known[:-1])[len(start) - 1 :]
        gap = likely.max(-1) - likely[np.arange(len(tokens)), tokens]
        assert gap.max() < (BFLOAT16 + 3 * ROUGH.get(kind, 0)) * np.abs(likely).max()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", NODES)
def test_dense(tmp_path, kind):
    check(tmp_path, kind, "LlamaForCausalLM")


@pytest.mark.gpu
@pytest.mark.parametrize("architecture, kind", EXPERTS)
def test_experts(tmp_path, architecture, kind):
    check(tmp_path, kind, architecture)
