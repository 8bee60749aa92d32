"""Every family against logits that transformers computed from the same tiny checkpoint (data/families/make.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import checkpoint, mesh, weights
from jaxserve.cache import PagedKV, Spans
from jaxserve.models import FAMILIES
from jaxserve.models.config import from_hf
from jaxserve.models.decoder import forward
from scripts import tiny_checkpoint
from tests import oracle

GOLDEN = sorted((Path(__file__).parents[1] / "data/families").glob("*.npz"))
PAGE, PAGES = 5, 5  # tokens a page, pages: chunks, windows and sequences end inside pages
SEQUENCES = 2
RUN = jax.jit(forward, static_argnames="cfg", donate_argnames="cache")


def named(*names):
    """The golden files of some cases."""
    return [path for path in GOLDEN if path.stem in names]


def cases(paths=GOLDEN):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def read(path):
    """(config.json, seed, token sequences, their logits) of a golden file."""
    with np.load(path) as file:
        tokens, logits = ([file[f"{kind}{i}"] for i in range(SEQUENCES)] for kind in ("tokens", "logits"))
        return json.loads(str(file["config"])), int(file["seed"]), tokens, logits


def error(got, expected):
    """The largest difference, relative to the largest logit."""
    return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()


def load(folder, hf, seed, tp):
    """The checkpoint's config and weights as the engine has them on a mesh of tp devices."""
    tiny_checkpoint.write(folder, hf, seed)
    on = mesh.make_mesh(tp)
    with checkpoint.open(folder) as file, mesh.on(on):
        cfg = from_hf(file.config)
        return weights.padded(cfg, tp), weights.load(file, cfg, on, "float32"), on


def engine_logits(cfg, params, on, tokens, size=8):
    """Logits of one sequence, over pages of the cache in chunks of `size`, the last one padded; 1 is decoding."""
    pages = jnp.arange(1, PAGES + 1, dtype=jnp.int32)[None]
    out = []
    with mesh.on(on):
        shape = PagedKV.shape(cfg, PAGES + 1, PAGE, on, "float32")
        cache = jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), shape)
        for start in range(0, len(tokens), size):
            chunk = np.zeros(size, np.int32)
            count = len(tokens[start : start + size])
            chunk[:count] = tokens[start : start + size]
            row = (jnp.array([n], jnp.int32) for n in (start, count))
            spans = Spans.locate(size, *row, pages, jnp.array([len(tokens)], jnp.int32))
            hidden, cache = RUN(cfg, params, cache, chunk, spans)
            out.append(np.asarray(params.head.dot(hidden, jnp.float32))[:count, : cfg.vocab])
    return np.concatenate(out)


def test_every_architecture_has_golden_logits():
    assert {read(path)[0]["architectures"][0] for path in GOLDEN} == set(FAMILIES)


@cases()
def test_oracle_equals_transformers(path):
    hf, seed, sequences, logits = read(path)
    arrays = tiny_checkpoint.tensors(hf, seed)
    for tokens, expected in zip(sequences, logits, strict=True):
        assert error(oracle.logits(arrays, hf, tokens), expected) < 1e-5


@cases()
def test_engine_equals_transformers(path, tmp_path):
    hf, seed, sequences, logits = read(path)
    model = load(tmp_path, hf, seed, tp=1)
    for tokens, expected in zip(sequences, logits, strict=True):
        assert error(engine_logits(*model, tokens), expected) < 1e-4


@cases(named("llama_dynamic", "mistral", "mixtral", "qwen2_window"))
def test_decoding_equals_transformers(path, tmp_path):
    hf, seed, (tokens, _), (expected, _) = read(path)
    assert error(engine_logits(*load(tmp_path, hf, seed, tp=1), tokens, size=1), expected) < 1e-4


@cases(named("internlm2_bias", "llama_bias", "mixtral", "qwen2", "qwen3_moe_mixed"))
def test_four_devices_equal_transformers(path, tmp_path):
    hf, seed, (tokens, _), (expected, _) = read(path)
    model = load(tmp_path, hf, seed, tp=4)  # pads 2 kv heads to 4 and 97 tokens to 100
    assert error(engine_logits(*model, tokens), expected) < 1e-4


def test_greedy_fixes_the_base_of_dynamic_ntk_by_the_prompt(tmp_path):
    scaling = {"max_position_embeddings": 8, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    hf = tiny_checkpoint.config("LlamaForCausalLM", **scaling)
    tiny_checkpoint.write(tmp_path, hf)
    prompt = list(range(10))
    first, second = oracle.greedy(tmp_path, None, prompt, 2)
    whole = oracle.logits(tmp_path, None, [*prompt, first], rope_len=10)
    assert second == whole[-1].argmax()
    assert error(oracle.logits(tmp_path, None, [*prompt, first]), whole) > 1e-3
