"""Rotary position embeddings: frequencies of each kind, and the angles of a step's tokens.

T tokens, H head dim.  A head's first and second half are the two coordinates of H/2 planes (Hugging Face's order).
Frequencies are computed in float64 on the host; angles are float32 whatever the model computes in.
"""

import math

import jax.numpy as jnp
import numpy as np


def table(rope, head_dim):
    """Inverse frequencies float32[H/2] and the factor for cos and sin.  For "dynamic": those of a short request."""
    inv_freq = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    scale = 1.0
    if rope.kind == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.kind == "llama3":
        inv_freq = _llama3(rope, inv_freq)
    elif rope.kind == "yarn":
        inv_freq, scale = _yarn(rope, inv_freq), _yarn_scale(rope)
    return inv_freq.astype(np.float32), scale


def dynamic(rope, head_dim, rope_len):
    """Inverse frequencies of "dynamic" [R, H/2] for the lengths [R] that fixed each request's base.

    The NTK base theta * (factor * length / original - factor + 1)^(H/(H-2)) is applied as a change of the exact table:
    a float32 power of theta itself would be off by 1e-6, which is 0.04 rad at position 40,000.
    """
    inv_freq, _ = table(rope, head_dim)
    length = jnp.maximum(rope_len, rope.original).astype(jnp.float32)
    stretch = jnp.log(rope.factor * length / rope.original - (rope.factor - 1))
    exponent = (-np.arange(0, head_dim, 2) / (head_dim - 2)).astype(np.float32)
    return inv_freq[None] * jnp.exp(stretch[:, None] * exponent[None])


def rotation(cfg, spans):
    """cos and sin float32[T, H/2] of a step's tokens; `spans` is the step's Spans (cache.py)."""
    inv_freq, scale = table(cfg.rope, cfg.head_dim)
    inv_freq = inv_freq[None]
    if cfg.rope.kind == "dynamic":
        inv_freq = dynamic(cfg.rope, cfg.head_dim, spans.rope_len)[spans.row]
    angle = spans.position.astype(jnp.float32)[:, None] * inv_freq
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def _llama3(rope, inv_freq):
    """Long wavelengths are divided by the factor, short ones kept, those between blended (Llama 3.1)."""
    turns = rope.original * inv_freq / (2 * math.pi)  # in the original context
    keep = np.clip((turns - rope.low_factor) / (rope.high_factor - rope.low_factor), 0, 1)
    return inv_freq * (keep + (1 - keep) / rope.factor)


def _yarn(rope, inv_freq):
    """NTK by parts (arXiv 2309.00071): planes under beta_slow turns are interpolated, those over beta_fast kept."""
    half = len(inv_freq)

    def plane(turns):  # that makes so many turns in the original context
        return half * math.log(rope.original / (turns * 2 * math.pi)) / math.log(rope.theta)

    low, high = plane(rope.beta_fast), plane(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = np.clip((np.arange(half) - low) / (high - low or 0.001), 0, 1)
    return inv_freq * (ramp / rope.factor + 1 - ramp)


def _yarn_scale(rope):
    """The paper's temperature, as a factor of cos and sin."""

    def mscale(weight):
        return 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
