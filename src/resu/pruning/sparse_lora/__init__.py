"""LoRA on sparse layers: adapters that keep the zeros, merged without losing them and taken out again bit for bit."""

from resu.pruning.sparse_lora.adapters import (
    adapter_names,
    adapter_state_dict,
    delete_adapter,
    disabled_adapters,
    enable_adapters,
    load_adapter_state_dict,
    set_adapters,
)
from resu.pruning.sparse_lora.apply import apply_sparse_lora, get_lora_layers, lora_parameters, unload_sparse_lora
from resu.pruning.sparse_lora.config import SparseLoRAConfig
from resu.pruning.sparse_lora.files import load_adapter, save_adapter
from resu.pruning.sparse_lora.kinds import SparseLoRAConv1D, SparseLoRAConv2d, SparseLoRALinear
from resu.pruning.sparse_lora.merging import merge_all_lora_weights, merge_loss, unmerge_all_lora_weights
from resu.pruning.sparse_lora.validation import validate_sparsity_preserved

__all__ = [
    "SparseLoRAConfig",
    "SparseLoRAConv1D",
    "SparseLoRAConv2d",
    "SparseLoRALinear",
    "adapter_names",
    "adapter_state_dict",
    "apply_sparse_lora",
    "delete_adapter",
    "disabled_adapters",
    "enable_adapters",
    "get_lora_layers",
    "load_adapter",
    "load_adapter_state_dict",
    "lora_parameters",
    "merge_all_lora_weights",
    "merge_loss",
    "save_adapter",
    "set_adapters",
    "unload_sparse_lora",
    "unmerge_all_lora_weights",
    "validate_sparsity_preserved",
]
