"""What the driver holds for one layer, and what it does to it: move its mask, and learn at pruned positions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from resu.core.counting import positions
from resu.core.enforcement import Constraint
from resu.core.layers import Layer
from resu.core.mask import SparseMask
from resu.core.optimizer_state import clear_state
from resu.core.sharding import local, part_of, shard_like, whole
from resu.training.observer import DenseGradient

__all__ = ["HeldLayer"]


class HeldLayer:
    """Mask, θ, momentum and counters of one layer. Tensors are the parts that lie on this rank.

    Attributes:
        layer: The weight, looked up by name.
        constraint: Holds the mask on it.
        keep: Active positions of the whole layer.
        theta: Values at pruned positions, 0 elsewhere; None where none are learned.
        reach: Where θ is learned, active positions among them; None: everywhere.
        reached: Positions of the whole layer in ``reach``.
        momentum: Exponential mean of dense gradients, fp32; None where the rule wants none.
        gradient: What the next update looks at.
        newborn: Positions that the last update has grown, for the step after it.
        ever: Positions that were active at some time; ``explored``: how many of the whole layer.
        grown: Positions grown by the last update, of the whole layer; ``grown_total`` by all of them.
        forward_work: Sum over the steps done of the active positions; ``update_work`` of the positions whose gradient
            was taken.
    """

    def __init__(self, layer: Layer) -> None:
        weight = local(layer.weight)
        self.layer = layer
        self.constraint = Constraint(layer.weight, SparseMask(torch.ones_like(weight, dtype=torch.bool)))
        self.keep = self.numel
        self.theta: Tensor | None = None
        self.reach: SparseMask | None = None
        self.reached = 0
        self.momentum: Tensor | None = None
        self.gradient: Tensor | None = None
        self.newborn: Tensor | None = None
        self.ever = self.constraint.mask
        self.explored = self.numel
        self.grown = self.grown_total = 0
        self.forward_work = self.update_work = 0
        self._observer = DenseGradient(self.constraint)

    @property
    def numel(self) -> int:
        """Positions of the whole layer."""
        return self.layer.weight.numel()

    @property
    def weight(self) -> Tensor:
        """The part of the weight that lies here."""
        return local(self.layer.weight).detach()

    @property
    def mask(self) -> SparseMask:
        """The mask of the whole layer; gathered from all ranks where it is sharded."""
        return self.gathered(self.constraint.mask)

    def gathered(self, mask: SparseMask) -> SparseMask:
        """A mask of local parts as that of the whole layer."""
        weight = self.layer.weight
        packed = whole(shard_like(mask.packed, weight))
        return mask if packed is mask.packed else SparseMask.from_packed(packed, weight.shape)

    def matrix(self, part: Tensor) -> Tensor:
        """A local part, gathered and as rules see it, ``[out, in…]``."""
        return self.layer.matrix(whole(shard_like(part, self.layer.weight)))

    def start(self) -> None:
        """The present mask is the first one: what was active before it does not count as explored."""
        self.ever = self.constraint.mask
        self.explored, self.grown, self.grown_total = self.keep, 0, 0

    def observe(self, wanted: bool) -> None:
        """Whether the dense gradient of the coming step is caught."""
        self.constraint.observer = self._observer if wanted else None

    @property
    def replaced(self) -> bool:
        """Whether the model has another parameter in this place than when this was made."""
        return self.layer.module._parameters.get(self.layer.attribute) is not self.constraint.parameter

    def count_work(self) -> None:
        """Add the step just done to the counters."""
        self.forward_work += self.keep
        if self.constraint.observer is not None or not self.constraint.mask_gradient:
            self.update_work += self.numel
        else:
            self.update_work += self.reached if self.reach is not None else self.keep

    def take_dense_gradient(self) -> Tensor | None:
        """What was caught of the step's dense gradient, in the order of the local part.

        A gradient that was assigned (of ``torch.autograd.grad``, of a loop of one's own) has passed no hook; it is
        dense if it is not 0 wherever the weight is pruned.
        """
        caught, given = self._observer.take(), self.layer.weight.grad
        if caught is not None or given is None:
            return caught
        given = local(given).to(torch.float32, copy=True)
        pruned = self.constraint.mask.zero_(given.clone(), active=True)
        return given if pruned.any() else None

    @torch.no_grad()
    def find_newborn(self) -> None:
        """Note the positions that the update before this step has grown: active, and 0."""
        self.newborn = positions(self.constraint.mask.mask & (self.weight == 0))

    @torch.no_grad()
    def cap_newborn(self, optimizer: Optimizer) -> None:
        """Let no newborn weight go further than the learning rate in its first step.

        Adam's bias correction counts the steps of the whole parameter. Of a weight whose moments were cleared late it
        makes a first step of ``(1 - β1) / sqrt(1 - β2)``, about 3.2, times the learning rate, whatever its gradient.
        """
        newborn, self.newborn = self.newborn, None
        if newborn is None or newborn.numel() == 0:
            return
        for group in optimizer.param_groups:
            if "betas" in group and any(p is self.layer.weight for p in group["params"]):
                at = torch.unravel_index(newborn, self.weight.shape)
                limit = float(group["lr"])
                self.weight[at] = self.weight[at].clamp(-limit, limit)

    def absorb(self, gamma: float) -> None:
        """θ += γ·Δ: take what the optimizer did at pruned positions out of the weight."""
        assert self.theta is not None
        update = self.constraint.take_pruned()
        if (self.theta.dtype, self.theta.device) != (update.dtype, update.device):  # model.to(…) since the last step
            self.theta = self.theta.to(update.device, update.dtype)
        if self.reach is not None:  # momentum moves also what gets no gradient any more
            self.reach.zero_(update, active=False)
        self.theta.add_(update, alpha=gamma)

    @torch.no_grad()
    def set_reach(self, reach: Tensor | None, optimizer: Optimizer) -> None:
        """Let θ learn where ``reach`` says, of the whole layer as rules see it; what leaves or enters starts anew."""
        if reach is None:
            self.reach = self.constraint.gradient_mask = None
            return
        self.reached = int(torch.count_nonzero(reach))
        new = SparseMask(part_of(self.layer.unmatrix(reach), self.layer.weight))
        if self.reach is not None:
            clear_state(optimizer, self.layer.weight, positions(self.reach.mask ^ new.mask))
        self.reach = self.constraint.gradient_mask = new

    @torch.no_grad()
    def move(self, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor] | None:
        """Make ``new`` the mask: dropped weights to 0 (or to θ), grown ones from θ (or 0).

        Args:
            old: The mask until now, of the whole layer as rules see it.
            new: The mask from now on, likewise.

        Returns:
            Flat positions of the local part that changed, and the weights there before; None if nothing did anywhere.
        """
        changed_everywhere = old ^ new
        moved = int(torch.count_nonzero(changed_everywhere))
        if moved == 0:
            self.grown = 0
            return None
        kept = int(torch.count_nonzero(new))
        self.grown = (moved + kept - self.keep) // 2
        self.grown_total += self.grown
        self.keep = kept
        here = part_of(self.layer.unmatrix(new), self.layer.weight)
        # Few positions change in one update, so only those are touched; by coordinates, for any memory format.
        changed = positions(part_of(self.layer.unmatrix(changed_everywhere), self.layer.weight))
        grown = here.reshape(-1)[changed]
        weight = self.weight
        at = torch.unravel_index(changed, weight.shape)
        before = weight[at]
        if self.theta is not None:
            value = before + self.theta[at]
            self.theta[at] = torch.where(grown, 0, value)
            weight[at] = torch.where(grown, value, 0)
        else:
            weight[at] = torch.where(grown, before, 0)
        self.constraint.mask = SparseMask(here)
        self.ever = self.ever | self.constraint.mask
        self.explored = self.gathered(self.ever).n_active
        return changed, before
