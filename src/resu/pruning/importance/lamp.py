"""w² over the squares that are not smaller."""

import torch
from torch import Tensor

from resu.core.counting import check_finite
from resu.pruning.importance.base import register_importance
from resu.pruning.statistics import Stats


@register_importance("lamp")
def lamp(weight: Tensor, stats: Stats) -> Tensor:
    """``w_u² / Σ_{|v| ≥ |u|} w_v²`` within the layer: a square as a share of what is left when it is next to go.

    Paper: Lee et al., arXiv 2010.07611, the LAMP score. It is made for ``distribution="global"``, where it takes the
    place of hand-set layer sparsities; ``distribution="lamp"`` does the same to any score. Within one layer it ranks
    as ``magnitude`` does, so without a global ranking it is the same. Cost: a sort, O(n log n), and float64 scores:
    in float32 the sums run out of digits from about 10⁶ weights on, and the order with them. Fails: where layers of
    very different sizes should keep unlike shares for other reasons than their weights'. Differs from the authors'
    code: equal magnitudes get equal scores (the sum takes in all of them), whatever order a sort leaves them in.

    Example:
        >>> from resu.pruning.importance import importances
        >>> importances["lamp"](torch.tensor([[1.0, -2.0, 2.0]]))
        tensor([[0.1111, 0.5000, 0.5000]], dtype=torch.float64)
    """
    check_finite(weight, "the weight")  # one NaN would be in every sum
    flat = weight.reshape(-1).abs()
    ascending, order = flat.sort()
    # The first of equal numbers has the sum over all of them; the queries are sorted, so this is one walk.
    square = ascending.double().square_()
    tail = square.flip(0).cumsum_(0).flip(0)
    if flat.numel() > 1 and bool((ascending[1:] == ascending[:-1]).any()):
        tail = tail[torch.searchsorted(ascending, ascending)]
    share = square.div_(tail.masked_fill_(tail == 0, 1))
    return torch.empty_like(share).scatter_(0, order, share).view(weight.shape)
