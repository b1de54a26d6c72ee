"""Will it fit? The memory of a training step, predicted from a ``config.json`` alone.

The model is built and trained for two steps in a dry run (:mod:`resu.modules.dry_run`): no weights are read or made,
and what is counted is what the real program would hold, activations and temporaries too.
"""

from __future__ import annotations

import gc
import warnings
from dataclasses import dataclass
from typing import Any

from resu.integrations.training_program import Setup, training_program
from resu.modules.dry_run import dry_run

__all__ = ["StepMemory", "predict_step"]


@dataclass(frozen=True)
class StepMemory:
    """Bytes of tensors, of one method.

    Attributes:
        weights: Held before the first step: weights, codes, masks, θ, adapters.
        state: What the first step leaves beside them: the optimizer's state.
        peak: The most during the second step, all together.
        trained: Values that train.
    """

    weights: int
    state: int
    peak: int
    trained: int

    @property
    def step(self) -> int:
        """What is there during a step only: activations, gradients, temporaries."""
        return self.peak - self.weights - self.state


def predict_step(config: Any, setup: Setup) -> StepMemory:
    """The memory that a training step will need on the CPU, without making it.

    Not in it: the process itself (Python and torch), NumPy's working memory (9 bytes per weight of one tile of QRESU,
    9 MB at most), and what the libraries of matrix products pack (a few MB in low precision).

    Args:
        config: A transformers configuration (:func:`resu.integrations.training_program.read_config`).
        setup: The method and its settings.

    Raises:
        ImportError: If ``lora`` is asked for without PEFT.
        ValueError: If the model has nothing that the method acts on, or takes fewer tokens.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(
        ...     vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4,
        ...     architectures=["LlamaForCausalLM"],
        ... )
        >>> full, qresu = (predict_step(config, Setup(method=m, length=32)) for m in ("full", "qresu4"))
        >>> full.peak > qresu.peak
        True
    """
    with dry_run() as run, warnings.catch_warnings():
        # torch warns of reading the gradient of a tensor that is none of a program's.
        warnings.filterwarnings("ignore", message=".*non-leaf Tensor.*")
        model, step = training_program(config, setup, dry=True)
        gc.collect()
        weights = run.restart()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        step()
        gc.collect()
        state = run.restart() - weights
        step()
        peak = run.peak
        del model, step
        gc.collect()
    return StepMemory(weights, state, peak, trained)
