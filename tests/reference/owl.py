"""OWL, restated from Yin et al., arXiv 2310.05175: outlier shares of blocks, rescaled to 2λ about the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


def outlier_share(scores: Sequence[NDArray[np.float64]], m: float) -> float:
    """The share of a block's scores above ``m`` times their mean."""
    flat = np.concatenate([s.reshape(-1) for s in scores]).astype(np.float64)
    return float(np.sum(flat > m * np.mean(flat))) / len(flat)


def densities(shares: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, lam: float) -> dict[str, float]:
    """The density of each block; the weighted mean is ``1 - sparsity`` (blocks of one size: the authors' mean)."""
    d = np.array(list(shares.values()))
    n = np.array([sizes[k] for k in shares], dtype=np.float64)
    spread = d.max() - d.min()
    raised = (d - d.min()) * (2 * lam / spread) if spread else np.zeros_like(d)
    found = raised - (raised @ n) / n.sum() + (1 - sparsity)
    return dict(zip(shares, found.tolist(), strict=True))
