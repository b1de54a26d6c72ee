"""What a run does when, seen from outside: losses, sparsity, phases."""

from __future__ import annotations

from torch import Tensor, nn

from resu.core.layers import select
from resu.experiments.methods import Plan, Setting
from resu.experiments.plots import Phase, Trace

__all__ = ["Watch", "phases_of"]


class Watch:
    """Follows a run from outside: the loss of every step, the sparsity of the network now and then."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.trace = Trace()

    def __call__(self, step: int, loss: Tensor) -> None:
        self.trace.loss.append(float(loss))
        if step % 4 == 0 or step == self.plan.steps - 1:
            share = self._sparsity()
            if not self.trace.sparsity or self.trace.sparsity[-1][1] != share:
                self.trace.sparsity.append((step, share))

    def _sparsity(self) -> float:
        from resu.modules.convert import get_resu_modules

        modules = get_resu_modules(self.model).values()
        if modules:  # their masks say it, also while θ fills the pruned positions
            pruned = sum(module.mask.n_pruned for module in modules if module.mask is not None)
            return pruned / sum(module.weight_shape.numel() for module in modules)
        weights = [layer.weight.detach() for layer in select(self.model).values()]
        return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def phases_of(setting: Setting, plan: Plan) -> list[Phase]:
    """What a method does when, as its setting says."""
    if setting.driver == "cycles":
        from resu.training import RESUConfig

        found: list[Phase] = []
        config = RESUConfig.from_dict(setting.options)
        names = ("train", "stabilize", "resurrection: θ trains")
        at = 0
        for _ in range(config.cycles):
            for name, steps in zip(names, config.phase_steps(), strict=True):
                found.append(Phase(name, at, at + steps))
                at += steps
        return [*found, Phase("fixed mask", at, plan.steps)]
    if setting.driver == "sparsifier":
        options = setting.options
        begin, end = options.get("begin_step", 0), options.get("end_step", plan.steps)
        if setting.algorithm == "static":
            return [Phase("train", 0, begin), Phase("fixed mask", begin, plan.steps)]
        ramp = options.get("ramp_end_step", end)
        return [
            Phase("train", 0, begin),
            Phase("ramp", begin, ramp),
            Phase("tournaments", ramp, end),
            Phase("fixed mask", end, plan.steps),
        ]
    return [Phase("train", 0, plan.steps)]
