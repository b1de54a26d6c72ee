"""Blocks, and statistics of a block that the pruned blocks before it feed."""

import copy

import pytest
import torch
from torch import nn

from resu.pruning.layerwise import Walk
from resu.pruning.one_shot import prune_model
from resu.pruning.targets import pruning_targets
from tests.pruning import hf_models


def wanda_by_hand(model, batches, units, sparsity=0.5, run=lambda m, b: m(**b)):
    """Masks as the paper has them: whole forward passes, one per unit, of the model as pruned so far."""
    masks = {}
    for names in units:
        inputs = {name: [] for name in names}
        handles = []
        for name in names:
            module = model.get_submodule(name.removesuffix(".weight"))
            handles.append(module.register_forward_pre_hook(lambda m, a, seen=inputs[name]: seen.append(a[0].detach())))
        with torch.no_grad():
            for batch in batches:
                run(model, batch)
        for handle in handles:
            handle.remove()
        for name in names:
            module = model.get_submodule(name.removesuffix(".weight"))
            transposed = type(module).__name__ == "Conv1D"
            weight = module.weight.detach().T if transposed else module.weight.detach()
            x = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs[name]])
            scores = weight.abs() * x.norm(dim=0)
            order = scores.argsort(dim=1, descending=True, stable=True)
            kept = weight.shape[1] - int(weight.shape[1] * sparsity)
            mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :kept], True)
            masks[name] = mask.T if transposed else mask
            with torch.no_grad():
                module.weight.mul_(masks[name])
    return masks


def units_of(model, batches, **options):
    layers, _ = pruning_targets(model)
    with Walk(model, layers, batches, **options) as walk:
        return [unit.layers for unit in walk.units], walk


@pytest.mark.parametrize("make", [hf_models.llama, hf_models.gpt2])
def test_masks_are_those_of_whole_forward_passes_of_the_pruned_model(make):
    """Position by position, in float64; the later blocks differ from those of the dense model's statistics."""
    model, batches = make(layers=3).double(), hf_models.token_batches()
    expected_model, dense = copy.deepcopy(model), copy.deepcopy(model)
    units, _ = units_of(model, batches)
    assert len(units) == 3
    expected = wanda_by_hand(expected_model, batches, units)
    result = prune_model(model, 0.5, "wanda", calibration=batches)
    assert set(result.masks) == set(expected)
    for name, mask in expected.items():
        assert torch.equal(result.masks[name], mask), name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected_model.get_parameter(name)), name
    from_dense = wanda_by_hand(dense, batches, [[n for names in units for n in names]])
    assert any(not torch.equal(from_dense[n], expected[n]) for n in units[2])
    assert all(torch.equal(from_dense[n], expected[n]) for n in units[0])


def test_masks_of_experts_are_those_of_the_tokens_they_see():
    model, batches = hf_models.mixtral(layers=2).double(), hf_models.token_batches()
    by_hand = copy.deepcopy(model)
    result = prune_model(model, 0.5, "wanda", calibration=batches)
    # The reference has the pruned first block, and prunes the second's experts by hand.
    by_hand.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
    by_hand.set_experts_implementation("eager")  # the grouped product of torch knows no float64
    experts, seen = by_hand.model.layers[1].mlp.experts, []
    with experts.register_forward_pre_hook(lambda m, args: seen.append(args)), torch.no_grad():
        for batch in batches:
            by_hand(**batch)
    hidden, chosen = torch.cat([s[0] for s in seen]), torch.cat([s[1] for s in seen])
    weight = by_hand.model.layers[1].mlp.experts.gate_up_proj.detach()
    for e in range(4):
        x = hidden[(chosen == e).any(dim=1)]
        order = (weight[e].abs() * x.norm(dim=0)).argsort(dim=1, descending=True, stable=True)
        mask = torch.zeros_like(weight[e], dtype=torch.bool).scatter_(1, order[:, :8], True)
        assert torch.equal(result.masks["model.layers.1.mlp.experts.gate_up_proj"][e], mask), e
    assert result.masks["model.layers.1.mlp.experts.down_proj"].shape == (4, 16, 24)


class Residual(nn.Module):
    """A convolution net without containers: layers in order of execution, one forward pass for each."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 3)  # runs last, is defined first
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.a = nn.Conv2d(6, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.b(self.a(x).relu())
        return self.last(x.mean(dim=(2, 3)))


def conv_wanda_by_hand(model, x, order):
    masks = {}
    for name in order:
        module, seen = model.get_submodule(name), []
        with module.register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0].detach())), torch.no_grad():
            model(x)
        weight = module.weight.detach()
        if weight.ndim == 4:
            columns = nn.functional.unfold(seen[0], module.kernel_size, padding=module.padding)
            norm = columns.transpose(0, 1).flatten(1).norm(dim=1)
        else:
            norm = seen[0].norm(dim=0)
        scores = weight.flatten(1).abs() * norm
        kept = scores.shape[1] - scores.shape[1] // 2
        best = scores.argsort(dim=1, descending=True, stable=True)[:, :kept]
        masks[f"{name}.weight"] = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True).view(weight.shape)
        with torch.no_grad():
            module.weight.mul_(masks[f"{name}.weight"])
    return masks


@pytest.mark.parametrize("kind", ["no containers", "sequential"])
def test_convolution_nets(kind):
    x = torch.randn(4, 3, 6, 6).double()
    if kind == "sequential":
        pool = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3), *pool, nn.Linear(6, 3))
        order = ["0", "2", "6"]
    else:
        model, order = Residual(), ["stem", "a", "b", "last"]
    model = model.double().train()
    units, walk = units_of(model, [x])
    assert [name for names in units for name in names] == [f"{name}.weight" for name in order]
    assert bool(walk.chains) == (kind == "sequential")
    expected = conv_wanda_by_hand(copy.deepcopy(model).eval(), x, order)
    result = prune_model(model, 0.5, "wanda", calibration=[x])
    assert all(torch.equal(result.masks[name], mask) for name, mask in expected.items())
    assert model.training  # as it was


# -- blocks


def block_names(model, batches, **options):
    return [(unit.name, unit.chain) for unit in units_of(model, batches, **options)[1].units]


def test_blocks_of_hugging_face_models():
    batches = hf_models.token_batches(1)
    assert block_names(hf_models.llama(), batches) == [("model.layers.0", 0), ("model.layers.1", 0)]
    assert block_names(hf_models.gpt2(), batches) == [("transformer.h.0", 0), ("transformer.h.1", 0)]
    both = {"input_ids": batches[0]["input_ids"], "decoder_input_ids": batches[0]["input_ids"][:, :5]}
    names = [name for name, _ in block_names(hf_models.t5(), [both])]
    assert names == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]


@pytest.mark.parametrize("make", [hf_models.llama, hf_models.gpt2, hf_models.mixtral, hf_models.gpt_oss, hf_models.t5])
@pytest.mark.parametrize("padded", [False, True])
def test_replayed_blocks_compute_what_the_model_computes(make, padded):
    """Nothing pruned: what the last block is given in the walk is bit for bit what it is given in a forward pass."""
    model = make()
    batches = hf_models.padded_and_not()[0] + hf_models.token_batches(1) if padded else hf_models.token_batches(2)
    if make is hf_models.t5:
        batches = [batch | {"decoder_input_ids": batch["input_ids"][:, :6]} for batch in batches]
    layers, _ = pruning_targets(model)
    with Walk(model, layers, batches) as walk:
        watched = walk.units[-1].name
        seen = []
        block = model.get_submodule(watched)
        hook = block.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for batch in batches:
            model(**batch)
        direct, seen[:] = list(seen), []
        walk.go({"inputs"}, lambda unit, inputs: None)
        hook.remove()
    # Once with hooks; the last block is not run a second time.
    assert len(seen) == len(direct)
    assert all(torch.equal(a, b) for a, b in zip(seen, direct, strict=True))


def test_blocks_may_be_named():
    model, batches = hf_models.llama(), hf_models.token_batches(1)
    names = block_names(model, batches, blocks=["model.layers.*.self_attn", "model.layers.*.mlp"])
    assert [n for n, _ in names] == [f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn", "mlp")]
    # Between the two lies a norm: what the second is given is captured, and the result is that of whole passes.
    double = model.double()
    by_hand = copy.deepcopy(double)
    result = prune_model(double, 0.5, "wanda", calibration=batches, blocks="model.layers.*.*")
    order = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
    homes = "self_attn", "mlp"
    units = [
        [f"model.layers.{i}.{home}.{n}.weight" for n in names]
        for i in (0, 1)
        for home, names in zip(homes, order, strict=True)
    ]
    expected = wanda_by_hand(by_hand, batches, units)
    assert all(torch.equal(result.masks[name], mask) for name, mask in expected.items())


def test_named_blocks_that_do_not_fit_are_refused():
    model, batches = hf_models.llama(), hf_models.token_batches(1)
    with pytest.raises(ValueError, match=r"the glob 'h\.\*' of blocks matches no module; there are for example model"):
        prune_model(model, 0.5, "wanda", calibration=batches, blocks="h.*")
    twice = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"has to run once in a forward pass; '0' ran 2 times"):
        prune_model(
            twice, 0.5, "wanda", calibration=[torch.ones(1, 4)], blocks="0", forward=lambda m, b: m(m(b))
        )  # fmt: skip


class Twisted(nn.Module):
    """Blocks that get something new each time, that write to what they are given, and that are skipped over."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        first = x
        for i, block in enumerate(self.blocks):
            x = block(x * 0.5 if i == 2 else x)
            x = (x + first).tanh() if i == 1 else x
        return x


class Inplace(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x, *, scale, cache):
        cache.append(1)
        x.mul_(scale)
        return {"x": self.fc(x) * len(cache), "extra": [x.sum()]}


class WithState(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Inplace() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x + 0 if block is self.blocks[0] else x, scale=0.7, cache=[])["x"]
        return x


@pytest.mark.parametrize("make", [Twisted, WithState])
def test_odd_blocks_are_replayed_as_they_run(make):
    model = make().double()
    by_hand, x = copy.deepcopy(model), torch.randn(5, 6).double()
    units, walk = units_of(model, [x])
    assert len(units) == len(model.blocks)
    assert walk.chains[0].captures == ({0, 2} if make is Twisted else {0})
    inside = "" if make is Twisted else ".fc"
    names = [[f"blocks.{i}{inside}.weight"] for i in range(len(model.blocks))]
    if make is Twisted:  # what block 1 gives is changed before block 2
        assert walk.chains[0].mutates is False
    expected = wanda_by_hand(by_hand, [x.clone()], names, run=lambda m, b: m(b.clone()))
    result = prune_model(model, 0.5, "wanda", calibration=[x])
    assert all(torch.equal(result.masks[name], mask) for name, mask in expected.items())


def test_a_backbone_and_a_head_are_pruned_by_the_blocks_of_the_backbone():
    backbone = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(6, 6), nn.ReLU())])
    model = nn.Sequential(backbone, nn.Linear(6, 2))
    names = [name for name, _ in block_names(model, [torch.randn(2, 6)])]
    assert names == ["0.0", "0.1", "0.2", "0.3", "0.4", "1.weight"]


def test_shared_blocks_are_pruned_by_all_their_calls():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x):
            for _ in range(3):
                x = self.blocks[0](x)
            return x

    model, x = Shared().double(), torch.randn(5, 4).double()
    by_hand = copy.deepcopy(model)
    assert block_names(model, [x]) == [("blocks.0.weight", None)]
    expected = wanda_by_hand(by_hand, [x], [["blocks.0.weight"]], run=lambda m, b: m(b))
    result = prune_model(model, 0.5, "wanda", calibration=[x])
    assert torch.equal(result.masks["blocks.0.weight"], expected["blocks.0.weight"])


def test_autocast_of_the_users_forward_holds_in_replayed_blocks():
    model, x = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)]), torch.randn(16, 8)
    seen = []

    def forward(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch)

    with model[2].register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype)):
        prune_model(model, 0.5, "wanda", calibration=[x], forward=forward)
    assert set(seen) == {torch.bfloat16}


def test_the_model_is_left_as_it_was_also_after_an_error():
    model, batches = hf_models.llama(), hf_models.token_batches(1)
    model.train()
    model.config.use_cache = True
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}

    def stop(done, total, what):
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_model(model, 0.5, "wanda", calibration=batches, progress=stop)
    assert all(module.training for module in model.modules())
    assert model.config.use_cache
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    # Layers 0–6 are the first block, pruned whole; the second is as it was, also its first two.
    sparse = {n for n, p in model.named_parameters() if p.ndim == 2 and int((p == 0).sum()) * 2 == p.numel()}
    assert sparse == {n for n in dict(model.named_parameters()) if "layers.0." in n and "norm" not in n}
