"""The configuration of sparse LoRA, as ``adapter_config.json`` holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from resu.integrations.peft.config import as_set, check_bias, stored_fields
from resu.integrations.peft.registration import add_peft_type
from resu.pruning.sparse_lora.config import SparseLoRAConfig

__all__ = ["SparseLoRAAdapterConfig"]


@dataclass
class SparseLoRAAdapterConfig(PeftConfig):
    """Sparse LoRA as a method of PEFT: LoRA on a pruned model that stays pruned, also after merging.

    The weights of the targets are 0 where ``masks`` prune, before the adapter comes. Modes are those of
    :class:`resu.pruning.sparse_lora.config.SparseLoRAConfig`; the default here is ``sparse_to_sparse``, where what is
    merged is what was trained.

    Args:
        r: Rank.
        alpha: The product BA is scaled by ``alpha / r``.
        dropout: Probability in training; of inputs in ``sparse_to_dense`` on linear layers, else of the r components.
        sparsity_mode: ``"sparse_to_sparse"``, ``"scale"`` or ``"sparse_to_dense"``.
        preserve_sparsity_on_merge: In ``sparse_to_dense``: lay the mask on the merged weight.
        masks: ``{weight or module name: mask}`` (SparseMask or bool tensor of the weight's shape, True = kept) or the
            path of a file of masks. Not stored here: the mask of each target lies in the adapter file.
        target_modules: As in PEFT; ``nn.Linear``, ``Conv1D`` of transformers and ``nn.Conv2d`` can be targets. By
            default the modules that LoRA has for the architecture.
        exclude_modules: Names or a regular expression of what is no target.
        layers_to_transform: Numbers of the layers that are targets.
        layers_pattern: Name of the list of layers these numbers mean.
        modules_to_save: Further modules that train and are saved whole (a new head).
        bias: ``"none"``, ``"all"`` or ``"sparse_lora_only"``: which biases train too.
        stored: True in a saved file: masks are read from the adapter file beside it.

    Raises:
        ValueError: On an unknown name or a value out of range; the error says what is allowed.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> mask = torch.rand(4, 8) < 0.5
        >>> _ = model[0].weight.data.mul_(mask)
        >>> config = SparseLoRAAdapterConfig(r=2, masks={"0.weight": mask}, target_modules=["0"])
        >>> merged = get_peft_model(model, config).merge_and_unload()
        >>> bool((merged[0].weight[~mask] == 0).all())
        True
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.05
    sparsity_mode: str = "sparse_to_sparse"
    preserve_sparsity_on_merge: bool = True
    masks: Any = field(default=None, repr=False)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    stored: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = add_peft_type("SPARSE_LORA")
        self.target_modules = as_set(self.target_modules)
        self.exclude_modules = as_set(self.exclude_modules)
        check_bias(self.bias, "sparse_lora_only")
        # Its checks are these.
        SparseLoRAConfig(r=self.r, alpha=self.alpha, dropout=self.dropout, sparsity_mode=self.sparsity_mode)
        if self.masks is None and not self.stored:
            raise ValueError(
                "sparse LoRA needs the masks of the pruned model: masks={weight name: mask}, or the path of a mask file"
            )

    @property
    def scale(self) -> float:
        """``alpha / r``."""
        return self.alpha / self.r

    def to_dict(self) -> dict[str, Any]:
        """What is written to ``adapter_config.json``: plain values; masks are not among them."""
        return stored_fields(self, without=("masks",))
