"""RESU, QRESU and sparse LoRA as methods of Hugging Face PEFT: ``get_peft_model(model, RESUAdapterConfig(…))``.

Importing this package makes its methods known to PEFT (:func:`register`), so that ``PeftModel.from_pretrained`` and
``AutoPeftModel…`` find them by the ``peft_type`` in ``adapter_config.json``. Everything else is PEFT's own.
"""

from resu.integrations.peft.registration import register_method  # isort: skip  (says what to install)
from resu.integrations.peft.config import QRESUAdapterConfig, RESUAdapterConfig
from resu.integrations.peft.layer import RESULayer
from resu.integrations.peft.quantized_layer import QRESULayer
from resu.integrations.peft.quantized_tuner import QRESUTuner
from resu.integrations.peft.sparse_lora_config import SparseLoRAAdapterConfig
from resu.integrations.peft.sparse_lora_layer import SparseLoRALayer
from resu.integrations.peft.sparse_lora_tuner import SparseLoRATuner
from resu.integrations.peft.tuner import RESUTuner

__all__ = [
    "QRESUAdapterConfig",
    "QRESULayer",
    "QRESUTuner",
    "RESUAdapterConfig",
    "RESULayer",
    "RESUTuner",
    "SparseLoRAAdapterConfig",
    "SparseLoRALayer",
    "SparseLoRATuner",
    "register",
]


def register() -> None:
    """Make the methods of this package known to PEFT. Done when the package is imported; again, it does nothing.

    Raises:
        RuntimeError: If the installed release of PEFT registers methods in another way.
    """
    register_method("resu", RESUAdapterConfig, RESUTuner)
    register_method("qresu", QRESUAdapterConfig, QRESUTuner)
    register_method("sparse_lora", SparseLoRAAdapterConfig, SparseLoRATuner)


register()
