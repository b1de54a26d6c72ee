"""What a sparse LoRA adapter is to be."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from resu.core.counting import check_sparsity

__all__ = ["MODES", "SparseLoRAConfig"]

# The mode of an adapter, and K of ``W + K ⊙ s·BA`` in its forward pass (see resu.kernels.masked_weight).
MODES = {"sparse_to_dense": "dense", "sparse_to_sparse": "mask", "scale": "scale"}


@dataclass(frozen=True)
class SparseLoRAConfig:
    """Settings of one adapter on sparse layers; checked at construction.

    With the mask M, the base weight W (0 at pruned positions), ``A [r, in]``, ``B [out, r]`` and ``s = alpha / r``:

    ==================  =====================================  ===========================================
    ``sparsity_mode``   weight in the forward pass             after a merge that preserves sparsity
    ==================  =====================================  ===========================================
    sparse_to_dense     ``M⊙W + s·BA`` (dense, cheap)          ``M⊙(W + s·BA)``: **another one** than trained
    sparse_to_sparse    ``M⊙(W + s·BA)`` (MaskLoRA)            the same
    scale               ``W⊙(1 + s·BA)`` (after ScaleLoRA)     the same
    ==================  =====================================  ===========================================

    MaskLoRA and ScaleLoRA: PERP, arXiv 2312.15230. Its ScaleLoRA, as in the authors' code, is ``W⊙(BA)`` with every
    entry of A and B at ``1/sqrt(r)``; all r columns then get equal gradients and stay equal, so its rank stays 1. Here
    the 1 stands apart, A is random and B is 0, as in LoRA: the start is the same weight, and the rank is used. What
    stands at pruned positions is told from the mask, not from weights that are 0, as there.

    Args:
        r: Rank.
        alpha: The product BA is scaled by ``alpha / r``.
        dropout: Probability, in training only. ``sparse_to_dense``: of each input of the adapter, as in LoRA. The other
            modes: of each of the r components (the inputs of a weight that is masked with its adapter cannot be dropped
            for the adapter alone without a second product of full size). The rest is scaled by ``1 / (1 - dropout)``.
        target_modules: Kinds of layers (``"Linear"``: ``nn.Linear`` and Hugging Face ``Conv1D``; ``"Conv2d"``;
            ``"Conv1D"``), or globs over module names or their last part (``"q_proj"``, ``"blocks.*.mlp.*"``).
        sparsity_mode: As above.
        initial_sparsity: By magnitude, in each layer, where no masks are given.
        maintain_sparsity: Whether pruned positions of the base weight are *held* at 0, under any optimizer and also if
            somebody lets it train, until a merge gives the mask up or the layer is unloaded. False: they are set to 0
            once. In ``sparse_to_dense`` this speaks of the base weight: the weight that acts is dense while training.
        preserve_sparsity_on_merge: Whether merging re-applies the mask in ``sparse_to_dense`` (the other modes merge
            masked in any case). False: what was trained is what is merged, and it is dense.
        exclude_modules: Globs of what to leave out.
        base_bits: Quantize the kept base weights to 4 or 8 bits, per output row, and free the dense weight; None: not.
        train_norms: Also train the parameters of normalization layers (PERP).
        train_biases: Also train biases.
        train_head: Globs over parameter or module names of what else trains, usually the head of the task.

    Raises:
        TypeError: If a number is none.
        ValueError: On a value outside its range or an unknown mode.

    Example:
        >>> SparseLoRAConfig(r=8, alpha=16).scale
        2.0
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.05
    target_modules: list[str] = field(default_factory=lambda: ["Linear"])
    sparsity_mode: str = "sparse_to_dense"
    initial_sparsity: float = 0.5
    maintain_sparsity: bool = True
    preserve_sparsity_on_merge: bool = True
    exclude_modules: list[str] = field(default_factory=list)
    base_bits: int | None = None
    train_norms: bool = False
    train_biases: bool = False
    train_head: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r must be a rank, an integer of 1 or more, got {self.r!r}")
        for name in ("alpha", "dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise ValueError(f"alpha must be a finite number above 0, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout!r}")
        if self.sparsity_mode not in MODES:
            raise ValueError(f"unknown sparsity_mode {self.sparsity_mode!r}; known: {', '.join(MODES)}")
        if self.base_bits not in (None, 4, 8) or isinstance(self.base_bits, bool):
            raise ValueError(f"base_bits must be 4, 8 or None, got {self.base_bits!r}")
        check_sparsity(self.initial_sparsity, "initial_sparsity")
        for name in ("target_modules", "exclude_modules", "train_head"):
            value = getattr(self, name)
            names = [value] if isinstance(value, str) else list(value)
            if not all(isinstance(one, str) for one in names):
                raise TypeError(f"{name} must be names or globs, got {value!r}")
            object.__setattr__(self, name, names)
        if not self.target_modules:
            raise ValueError('target_modules is empty: name kinds of layers ("Linear") or globs over module names')

    @property
    def scale(self) -> float:
        """``alpha / r``."""
        return self.alpha / self.r
