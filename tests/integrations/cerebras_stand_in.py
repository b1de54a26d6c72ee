"""A small stand-in for what of Cerebras' software is used here: the interfaces and when they are called, on the CPU.

``install(monkeypatch)`` makes ``cerebras.pytorch`` and ``cerebras.modelzoo.trainer.callbacks`` importable. What is not
here is an error. Written from the interface as it is documented; the checks of ``cerebras_checks.py`` run on the real
``cerebras-pytorch`` too (see ``test_cerebras.py``).
"""

import fnmatch
import inspect
import sys
import types

import torch
from torch import nn


class SparseParameter:
    """A mask as the buffer ``<parameter>_mask`` of the module that owns the parameter."""

    def __init__(self, module, name, initial):
        self.module, self.name, self.param_name = module, name, name.rpartition(".")[2]
        self.initial, self.ready, self.hook = initial, False, None
        module.register_buffer(f"{self.param_name}_mask", torch.ones_like(self.param, dtype=torch.bool))
        module._register_load_state_dict_pre_hook(self._loading)

    def _loading(self, state, *args):
        self.ready = self.ready or f"{self.name}_mask" in state

    @property
    def param(self):
        return getattr(self.module, self.param_name)

    @property
    def mask(self):
        return getattr(self.module, f"{self.param_name}_mask")

    @mask.setter
    def mask(self, value):
        assert self.ready, "a mask is changed before it is initialized"
        self.mask.copy_(value)
        self.prune(self.param)

    def prune(self, tensor):
        with torch.no_grad():
            tensor.mul_(self.mask)


def make_mask_topk_sparsity(score, sparsity):
    keep = int(((1 - sparsity) * torch.tensor(score.numel(), dtype=torch.float)).int())
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[score.flatten().topk(keep).indices] = True
    return mask.view_as(score)


INITIAL = {
    "random": lambda p, sparsity: make_mask_topk_sparsity(torch.rand_like(p), sparsity),
    "topk": lambda p, sparsity: make_mask_topk_sparsity(p.abs(), sparsity),
    "from_zeros": lambda p, sparsity: p != 0,
}


class SparsityAlgorithm:
    def __init__(self, sparsity, init_method="random"):
        self.level = torch.tensor(float(sparsity))
        self.init_method = INITIAL[init_method]
        self.sparse_params = {}

    def get_sparse_params(self, of):
        assert isinstance(of, torch.Tensor)
        return getattr(of, "_sparse_param", None)

    def initialize(self):
        for held in self.sparse_params.values():
            if not held.ready:
                held.mask.copy_(self.init_method(held.param.detach(), self.level))
                held.ready = True

    def sparsify_parameter(self, module, name, param):
        if param is None or self.get_sparse_params(param) is not None:
            return
        param._sparse_param = self.sparse_params[name] = SparseParameter(module, name, self.init_method)

    def sparsify_module(self, model, wanted):
        for name, param in list(model.named_parameters()):
            if wanted(name, param):
                self.sparsify_parameter(model.get_submodule(name.rpartition(".")[0]), name, param)
        model.register_forward_pre_hook(self._before_forward)

    def _before_forward(self, model, args):
        for held in self.sparse_params.values():
            held.prune(held.param)
            if held.hook is None:
                held.hook = held.param.register_hook(lambda grad, p=held.param: self._grad_hook(p, grad))

    def _grad_hook(self, p, grad):
        return torch.where(p._sparse_param.mask, grad, torch.zeros_like(grad))

    def sparsify_optimizer(self, optimizer):
        optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer, args, kwargs):
        for held in self.sparse_params.values():
            held.prune(held.param)
        self.update(optimizer)


class Static(SparsityAlgorithm):
    def update(self, optimizer):
        pass


class DynamicSparsityAlgorithm(SparsityAlgorithm):
    def __init__(self, sparsity=None, update=None, **kwargs):
        super().__init__(sparsity, **kwargs)
        self.schedule = {"freq": 1, "start": 0, "stop": None, **(update or {})}
        self.step = torch.tensor(0)

    @property
    def is_update_step(self):
        start, stop = self.schedule["start"] or 0, self.schedule["stop"]
        due = (self.step >= start) & ((self.step - start) % self.schedule["freq"] == 0)
        return due if stop is None else due & (self.step < stop)

    @torch.no_grad()
    def update(self, optimizer):
        self.step += 1
        for held in self.sparse_params.values():
            if held.param.grad is None:
                continue
            new = self.update_mask(held.param, held.mask, self.level.clamp(0, 1))
            held.mask = torch.where(self.is_update_step, new, held.mask)


class Group:
    def __init__(self, wanted, algorithm):
        self.wanted, self.algorithm = wanted, algorithm

    def apply(self, target):
        if isinstance(target, nn.Module):
            self.algorithm.sparsify_module(target, self.wanted)
        else:
            self.algorithm.sparsify_optimizer(target)

    def initialize(self):
        self.algorithm.initialize()


def _subclasses(kind):
    return [kind, *(c for child in kind.__subclasses__() for c in _subclasses(child))]


def _default(name, param):
    dense = ("embedding", "norm", "lm_head", "pe_helper")
    return param.ndim > 1 and not any(word in name.lower() for word in dense)


def configure(config):
    options = dict(config)
    name, globs = options.pop("algorithm", "static"), options.pop("param_filter", None)
    known = {kind.__name__.lower(): kind for kind in _subclasses(SparsityAlgorithm)[1:]}
    algorithm = known[name.lower()](**options)
    if globs is None:
        return Group(_default, algorithm)
    return Group(lambda name, _: any(fnmatch.fnmatch(name, glob) for glob in globs), algorithm)


class Callback:
    """Every hook does nothing; those a run here calls are listed."""

    def pre_setup(self, trainer): ...
    def setup(self, trainer): ...
    def post_setup(self, trainer): ...
    def finalize(self): ...
    def on_train_start(self, trainer, model, train_dataloader, loop, loop_idx): ...
    def on_train_batch_start(self, trainer, model, batch, batch_idx): ...
    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx): ...
    def on_after_optimizer_step(self, trainer, model, optimizer): ...
    def on_save_checkpoint(self, trainer, state_dict): ...
    def on_load_checkpoint(self, trainer, state_dict): ...
    def on_save_trainer_state(self, trainer, state_dict): ...
    def on_load_trainer_state(self, trainer, state_dict): ...


class Lora(Callback):
    def __init__(self, lora_params: dict | list[dict]):
        self.lora_params = lora_params


def make_callbacks(entries):
    """Callbacks of a YAML list, checked as the trainer does: one key, a known name, arguments as annotated."""
    known = {kind.__name__.lower(): kind for kind in _subclasses(Callback)[1:]}
    made = []
    for entry in entries:
        ((name, arguments),) = entry.items()
        kind = known[name.lower()]
        signature = inspect.signature(kind.__init__)
        for key, value in arguments.items():
            wanted = signature.parameters[key].annotation
            assert not isinstance(wanted, str), f"{name}.{key}: annotations must be types, not texts"
            if wanted in (str, bool, int, float):
                assert type(value) is wanted, f"{name}.{key} must be {wanted.__name__}, got {value!r}"
        made.append(kind(**arguments))
    return made


class Trainer:
    """Calls hooks in the order of the real one: set up, load, train, save."""

    def __init__(self, model, config, rate=0.1):
        self.model, self.optimizer = model, torch.optim.SGD(model.parameters(), lr=rate)
        self.callbacks = make_callbacks(config["trainer"]["init"].get("callbacks") or [])
        for hook in ("pre_setup", "setup", "post_setup"):
            self.call(hook)

    def call(self, hook, *args):
        for callback in self.callbacks:
            getattr(callback, hook)(self, *args)

    def load(self, state):
        self.call("on_load_checkpoint", state)
        self.model.load_state_dict(state["model"])

    def fit(self, batches):
        self.call("on_train_start", self.model, batches, None, 0)
        for index, (x, y) in enumerate(batches):
            self.call("on_train_batch_start", self.model, (x, y), index)
            loss = nn.functional.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.call("on_after_optimizer_step", self.model, self.optimizer)
            self.call("on_train_batch_end", self.model, {"loss": loss}, (x, y), index)

    def state(self, hook="on_save_checkpoint"):
        state = {"model": self.model.state_dict()} if hook == "on_save_checkpoint" else {}
        self.call(hook, state)
        return state


def install(monkeypatch):
    """Put the stand-ins where the real packages would be; what was imported without them is forgotten."""
    here = globals()
    sparse_names = ("SparsityAlgorithm", "DynamicSparsityAlgorithm", "Static", "Group", "configure")
    places = {
        "cerebras": {},
        "cerebras.pytorch": {},
        "cerebras.pytorch.sparse": {name: here[name] for name in sparse_names},
        "cerebras.pytorch.sparse.utils": {"make_mask_topk_sparsity": make_mask_topk_sparsity},
        "cerebras.pytorch.optim": {"SGD": torch.optim.SGD},
        "cerebras.modelzoo": {},
        "cerebras.modelzoo.trainer": {},
        "cerebras.modelzoo.trainer.callbacks": {"Callback": Callback},
    }
    for name, members in places.items():
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        above, _, last = name.rpartition(".")
        if above:
            setattr(sys.modules[above], last, module)
    for name in ("algorithm", "callback"):
        monkeypatch.delitem(sys.modules, f"resu.integrations.cerebras.{name}", raising=False)
    return sys.modules["cerebras.pytorch"]
