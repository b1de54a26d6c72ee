"""|w|·‖x‖."""

from torch import Tensor

from resu.pruning.importance.base import input_norms, register_importance, wide
from resu.pruning.statistics import Stats


@register_importance("wanda", needs={"inputs"}, scope="row")
def wanda(weight: Tensor, stats: Stats) -> Tensor:
    """``|W_ij|·‖x_j‖₂``, compared within each output row: weights of large inputs stay though they are small.

    Paper: Sun et al., arXiv 2306.11695, eq. 1; N:M in groups of M consecutive inputs, §3. Cost: a forward pass over
    some calibration data (128 sequences in the paper), one norm per input, no weight update. Fails: above about 60 % on
    language models, where ``sparsegpt`` or ``distribution="owl"`` hold longer, and with data unlike the model's use.
    Differs from the authors' code: ties keep exactly the count, padding tokens do not count, and norms
    are over all tokens, not divided by the number of sequences (which changes no ranking within a layer). Compared
    over the whole layer instead of by row it is another method: other positions stay.
    """
    return wide(weight).abs() * input_norms(weight, stats)
