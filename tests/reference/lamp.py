"""LAMP, restated from Lee et al., arXiv 2010.07611: each score from its definition, then one global ranking."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def scores(values: Sequence[float]) -> list[float]:
    """``s_u² / Σ_{s_v ≥ s_u} s_v²`` with exact sums; 0 where the sum is 0."""
    squares = [Fraction(v) ** 2 for v in values]
    result = []
    for square in squares:
        rest = sum((q for q in squares if q >= square), Fraction(0))
        result.append(float(square / rest) if rest else 0.0)
    return result


def global_masks(layers: Sequence[Sequence[float]], sparsity: float) -> list[list[bool]]:
    """The best of all layers together; ties keep the earlier layer, then the lower index; no layer is left empty."""
    ranked = [scores(layer) for layer in layers]
    total = sum(map(len, layers))
    keep = total - math.floor(Fraction(str(sparsity)) * total)
    saved: dict[int, int] = {}
    while True:
        places = [(-s, i, j) for i, layer in enumerate(ranked) if i not in saved for j, s in enumerate(layer)]
        kept = {(i, j) for _, i, j in sorted(places)[: keep - len(saved)]} | set(saved.items())
        empty = [i for i in range(len(layers)) if not any((i, j) in kept for j in range(len(layers[i])))]
        if not empty:
            return [[(i, j) in kept for j in range(len(layer))] for i, layer in enumerate(layers)]
        saved |= {i: max(range(len(ranked[i])), key=lambda j: (ranked[i][j], -j)) for i in empty}
