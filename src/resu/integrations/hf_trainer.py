"""Sparse training in the ``Trainer`` of Hugging Face transformers: one callback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from resu.core.mask import SparseMask
from resu.core.mask_files import write_masks
from resu.integrations.driving import (
    STATE_FILE,
    Recipe,
    check_zeros,
    gathered_state,
    read_state,
    release,
    sparsity_metrics,
    write_state,
)
from resu.training.algorithms.base import Algorithm
from resu.training.sparsifier import Sparsifier
from resu.training.wrappers import unwrap

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import TrainerControl, TrainerState
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError("this needs transformers: pip install 'resu-torch[hf]'", name=error.name) from error

__all__ = ["SparsityCallback"]

_TRAINER_STATE = "trainer_state.json"


class SparsityCallback(TrainerCallback):
    """Sparse training with ``Trainer``: ``Trainer(…, callbacks=[SparsityCallback(RESU(sparsity=0.9, …))])``.

    The driver is made when training begins and counts optimizer steps, as ``global_step`` does (a step that fp16 skips
    is none). Its state goes into every checkpoint folder as ``sparsifier.pt``, and a run that resumes from there
    equals the uninterrupted one bit for bit. With ``load_best_model_at_end`` the masks of the best model come back with
    it. When training has ended, the masks go on holding: ``callback.sparsifier.commit()`` gives the plain model. A
    second ``train()`` begins anew, from the weights as they are. In a hyperparameter search no state is written.

    Sparsity and R_s are added to the logs of the loss: to ``state.log_history`` and what is printed, and to what goes
    to TensorBoard and the like if the callback comes before theirs (:meth:`attach`).

    Args:
        algorithm: A topology rule, or a function from the total number of optimizer steps to one.
        save_masks: Also write ``masks.safetensors``, which ``resu inspect`` and ``resu validate`` read, beside the
            model in each checkpoint folder, and at the end in ``output_dir``, where ``trainer.save_model()`` puts it.
        resume_from: The checkpoint that training resumes from, where it is not in ``output_dir``.
        prefix: Of the names in the logs.
        **options: ``pattern``, ``distribution``, ``include``, ``exclude``, ``seed``, as of
            :class:`~resu.training.sparsifier.Sparsifier`.

    Example:
        >>> from resu.training import RESU
        >>> callback = SparsityCallback(lambda steps: RESU(sparsity=0.9, end_step=int(0.75 * steps)), pattern="row")
    """

    def __init__(
        self,
        algorithm: Algorithm | Callable[[int], Algorithm],
        *,
        save_masks: bool = False,
        resume_from: str | os.PathLike[str] | None = None,
        prefix: str = "",
        **options: Any,
    ) -> None:
        self.recipe = Recipe(algorithm, options)
        self.save_masks = save_masks
        self.resume_from = resume_from
        self.prefix = prefix
        self._sparsifier: Sparsifier | None = None

    @property
    def sparsifier(self) -> Sparsifier:
        """The driver; there is none before training begins."""
        if self._sparsifier is None:
            raise RuntimeError("there is no sparsifier yet: it is made when training begins, with the optimizer")
        return self._sparsifier

    def attach(self, trainer: Any) -> SparsityCallback:
        """Add the callback to a trainer, before those that report to TensorBoard, W&B and others."""
        callbacks = trainer.callback_handler.callbacks
        if self not in callbacks:
            trainer.add_callback(self)
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))
        return self

    # -- events --------------------------------------------------------------------------------------
    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make the driver; model and optimizer are there, and loaded if training resumes."""
        model: nn.Module = kwargs["model"]
        folder = self._resumed_from(args, state)
        saved = read_state(folder / STATE_FILE) if folder is not None else None
        before = self._sparsifier
        if before is not None and before.model is unwrap(model) and saved is not None:
            before.load_state_dict(saved)  # or letting go of it would zero what was loaded where its masks prune
        release(before)
        self._sparsifier = self.recipe.make(model, kwargs["optimizer"], state.max_steps)
        if saved is not None:
            self._load(saved, folder)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add to what is logged of the loss."""
        logs = kwargs.get("logs")
        if self._sparsifier is not None and logs is not None and ("loss" in logs or "train_loss" in logs):
            metrics = sparsity_metrics(self._sparsifier, self.prefix)
            logs.update(metrics)
            if state.log_history:
                state.log_history[-1].update(metrics)  # a copy of the logs, made before this event

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state, and the masks if asked, into the checkpoint just written."""
        if state.is_hyper_param_search:  # only the trainer knows the folder
            return
        folder = _checkpoint_folder(args, state)
        saved = gathered_state(self.sparsifier)  # on every rank
        if args.should_save:
            write_state(saved, folder / STATE_FILE)
        self._write_masks(folder, kwargs["model"], args.should_save)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Follow the trainer to its best model, and write the masks if asked."""
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and not state.is_hyper_param_search:
            self._load(read_state(Path(best) / STATE_FILE), Path(best))
        self._write_masks(Path(args.output_dir), kwargs["model"], args.should_save)

    # -- files ---------------------------------------------------------------------------------------
    def _resumed_from(self, args: Any, state: TrainerState) -> Path | None:
        """The folder that the trainer has loaded, which it does not say; None if training starts from nothing."""
        if state.global_step == 0:
            if self.resume_from is not None:
                raise ValueError(
                    f"resume_from={str(self.resume_from)!r} is given, but training starts at step 0; call "
                    "trainer.train(resume_from_checkpoint=…) with the same folder, or leave resume_from out"
                )
            return None
        named = [args.resume_from_checkpoint, _checkpoint_folder(args, state)]
        folders = [Path(p) for p in ([self.resume_from] if self.resume_from is not None else named) if p is not None]
        for folder in folders:
            if _step_of(folder) == state.global_step and (folder / STATE_FILE).is_file():
                return folder
        raise FileNotFoundError(
            f"training resumes at step {state.global_step}, and there is no {STATE_FILE} of that step in "
            f"{' or '.join(map(str, folders))}; give SparsityCallback(resume_from=…) the folder it resumes from. A run "
            "that was trained without this callback cannot be resumed with it: start a new one from its weights"
        )

    def _load(self, saved: dict[str, Any], folder: Path | None) -> None:
        self.sparsifier.load_state_dict(saved)
        check_zeros(self.sparsifier, f"{folder}/{STATE_FILE}")

    def _write_masks(self, folder: Path, model: Any, writes: bool) -> None:
        if not self.save_masks:
            return
        # Of tied weights one is stored, under the name that the others are tied to.
        stored: dict[str, str] = getattr(unwrap(model), "all_tied_weights_keys", None) or {}
        masks: dict[str, SparseMask] = {stored.get(n, n): mask for n, mask in self.sparsifier.masks.items()}
        if writes:  # every rank has asked for the masks, which may be gathered
            folder.mkdir(parents=True, exist_ok=True)
            summary = {"step": self.sparsifier.step, "sparsity": self.sparsifier.sparsity}
            write_masks(masks, folder / "masks.safetensors", summary, overwrite=True)


def _checkpoint_folder(args: Any, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _step_of(folder: Path) -> int | None:
    """The step a checkpoint was written at, if it is one."""
    try:
        found = json.loads((folder / _TRAINER_STATE).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) else None
