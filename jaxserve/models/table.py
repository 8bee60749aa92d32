"""The row of a family's weight table: which tensors of a checkpoint become which leaf of Params.

A row says names, shapes and placement only; jaxserve/weights.py reads, arranges and places.
Letters: D width, F ffn, K kv heads, G query heads a kv head, H head dim, E experts, V vocab.

`arrange` is one of
  None              one source, used as stored: norm vectors [D] or [H], the embedding [V, D]. A plain array.
  "linear"          one source [out, in] -> Dense [in, out]                         (o, down, head, router)
  "qkv"             q [K*G*H, D], k [K*H, D], v [K*H, D] -> Dense [D, K, G+2, H]; query heads of one kv head are
                    consecutive in q, so q is reshaped [K, G, H], and k and v are appended to each group
  "wqkv"            one source [K*(G+2)*H, D], its rows already ordered [K, G+2, H] -> Dense [D, K, G+2, H]
  "gate_up"         gate [F, D], up [F, D] -> Dense [D, 2, F]
  "experts"         one source an expert, [out, in] -> Dense [E, in, out]           (down: [E, F, D])
  "experts_gate_up" gate [F, D], up [F, D] of every expert -> Dense [E, D, 2, F]
"""

from typing import NamedTuple


class Row(NamedTuple):
    """Tensors of a checkpoint and the leaf they become."""

    sources: tuple[str, ...]  # names without ".weight"; the first {} is the layer, a second one the expert
    path: str  # leaf of Params; {} is the layer
    shapes: tuple[tuple[int, ...], ...]  # of each source, as the checkpoint stores it
    spec: tuple  # mesh axis (or None) for each axis of the arranged weight; a bias has spec[1:]
    arrange: str | None = None
    bias: bool = False  # every source must have a ".bias" [out]; where False, one is read if it is there
    layers: tuple[int, ...] | None = None  # layers that this row is for; None: all
