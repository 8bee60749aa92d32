"""Random ragged batches over a paged pool, and attention to them in plain NumPy, one token at a time."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.kv_quant import QuantizedPool, quantize


class Case:
    """Rows with `new` tokens each, the last ones of `lengths` cached tokens (0 and 0: an unused row), then padding.

    What a step with this window has no business with is NaN in the pools.
    """

    def __init__(self, lengths, new, *, padding=0, kv_heads=2, group=3, head_dim=16, page_size=16, layers=2, spare=1,
                 dtype=np.float32, seed=0, window=None):  # fmt: skip
        random = np.random.default_rng(seed)
        self.length, self.count = np.array(lengths, np.int32), np.array(new, np.int32)
        self.start = self.length - self.count
        self.first = (np.cumsum(self.count) - self.count).astype(np.int32)
        used = [-(-length // page_size) for length in lengths]
        number = sum(used) + 2
        self.pages = np.zeros((len(lengths), max(used) + spare), np.int32)
        shuffled = random.permutation(np.arange(1, number))
        for row, pages in enumerate(used):
            self.pages[row, :pages], shuffled = shuffled[:pages], shuffled[pages:]
        tokens = sum(new) + padding
        self.row = np.concatenate([np.repeat(np.arange(len(new)), self.count), np.zeros(padding, int)])
        self.position = np.full(tokens, -1)
        for first, count, start in zip(self.first, self.count, self.start, strict=True):
            self.position[first : first + count] = start + np.arange(count)
        self.q = self._normal(random, (tokens, kv_heads, group, head_dim), dtype)
        pool = (layers, number, page_size, kv_heads, head_dim)
        self.k, self.v = self._normal(random, pool, dtype), self._normal(random, pool, dtype)
        written = np.zeros((number, page_size), bool)
        for row, length in enumerate(lengths):
            at = np.arange(0 if window is None else max(0, self.start[row] - window + 1), length)
            written[self.pages[row, at // page_size], at % page_size] = True
        for array in (self.k, self.v):  # what nobody has written, or may look at any more, must not matter
            array[:, ~written] = np.nan

    @staticmethod
    def _normal(random, shape, dtype):
        return random.standard_normal(shape, np.float32).astype(dtype)

    def rows(self):
        return tuple(jnp.asarray(x) for x in (self.pages, self.first, self.count, self.start))

    def expected(self, layer, scale, window=None):
        """Softmax attention in float64, a token at a time."""
        out = np.zeros(self.q.shape)
        for token, position in enumerate(self.position):
            if position < 0:
                continue
            oldest = 0 if window is None else max(0, position - window + 1)
            k, v = (
                pool[layer][self.pages[self.row[token]]].reshape(-1, *pool.shape[3:])[oldest : position + 1]
                for pool in (self.k.astype(np.float64), self.v.astype(np.float64))
            )
            scores = np.einsum("kgh,skh->kgs", self.q[token].astype(np.float64), k) * scale
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[token] = np.einsum("kgs,skh->kgh", weights / weights.sum(-1, keepdims=True), v)
        return out


def quantized(case, kind):
    """The pools of a case as QuantizedPools; what is NaN there is junk in these, its scales and zeros NaN."""
    out = []
    for pool in (case.k, case.v):
        x = jnp.swapaxes(jnp.asarray(pool), 2, 3)
        codes, parameters = quantize(x, kind)
        junk = jnp.isnan(x.astype(jnp.float32)).any(-1)
        codes = jnp.where(junk[..., None], jnp.uint8(171), codes)
        out.append(QuantizedPool(codes, jnp.where(junk, 0x7E007E00, parameters), kind))
    return out
