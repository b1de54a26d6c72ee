"""Inputs of experts, attention and convolutions, without padding, against plain restatements in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resu.core.layers import Layer, select
from resu.pruning.inputs import padding_masks
from resu.pruning.statistics import collect
from resu.pruning.targets import pruning_targets
from tests.pruning import hf_models

BOTH = {"inputs", "hessian"}


def reference(x):
    """Norm, mean and Hessian of ``[tokens, in]``, in float64."""
    x = x.reshape(-1, x.shape[-1]).double()
    return x.norm(dim=0), x.mean(dim=0), 2 / len(x) * x.T @ x


def agree(stats, x, part=None, rtol=1e-4):
    norm, mean, hessian = reference(x)
    seen = (stats.input_norm, stats.input_mean, stats.hessian)
    if part is not None:
        p, parts = part
        seen = (seen[0].chunk(parts)[p][0], seen[1].chunk(parts)[p][0], seen[2][p])
        assert (stats.input_norm.chunk(parts)[p] == seen[0]).all()  # every row of an expert sees the same
    for got, want in zip(seen, (norm, mean, hessian), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-5)


def test_linear_means_and_hessians_over_batches():
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    batches = [torch.randn(3, 5, 6), torch.randn(2, 5, 6)]
    stats = collect(model, select(model), batches, BOTH)
    x = torch.cat([b.reshape(-1, 6) for b in batches])
    agree(stats["0.weight"], x)
    agree(stats["2.weight"], model[1](model[0](x)).detach())
    assert stats["0.weight"].hessian.dtype == torch.float32
    only = collect(model, select(model), batches, {"hessian"})["0.weight"]
    assert only.input_norm is None
    torch.testing.assert_close(only.hessian, stats["0.weight"].hessian)


def test_double_models_have_double_hessians():
    model = nn.Sequential(nn.Linear(6, 4)).double()
    x = torch.randn(7, 6).double()
    stats = collect(model, select(model), [x], BOTH)["0.weight"]
    assert {t.dtype for t in (stats.input_norm, stats.input_mean, stats.hessian)} == {torch.float64}
    torch.testing.assert_close(stats.hessian, 2 / 7 * x.T @ x, rtol=1e-14, atol=0)


def test_transformers_conv1d():
    model, batches = hf_models.gpt2(), hf_models.token_batches()
    layers, _ = pruning_targets(model)
    seen = []
    fc = model.transformer.h[1].mlp.c_fc
    with fc.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach())):
        stats = collect(model, layers, batches, BOTH)
    agree(stats["transformer.h.1.mlp.c_fc.weight"], torch.cat(seen))


@pytest.mark.parametrize("conv", [
    nn.Conv2d(3, 4, (3, 2), padding=1),
    nn.Conv2d(4, 6, 3, stride=2, groups=2),
    nn.Conv2d(4, 4, 3, dilation=2, padding=2, groups=4),
    nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
])  # fmt: skip
def test_convolutions_see_the_unfolded_input(conv):
    x = torch.randn(5, conv.in_channels, 9, 8)
    stats = collect(nn.Sequential(conv), select(nn.Sequential(conv)), [x[:2], x[2:]], BOTH)["0.weight"]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    columns = F.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)
    # The columns are those the weight multiplies.
    groups, rows = conv.groups, conv.out_channels // conv.groups
    parts = columns.transpose(1, 2).reshape(-1, columns.shape[1]).chunk(groups, dim=1)
    made = torch.cat([p @ w.flatten(1).T for p, w in zip(parts, conv.weight.chunk(groups), strict=True)], dim=1)
    assert torch.allclose(made + conv.bias, conv(x).permute(0, 2, 3, 1).reshape(-1, conv.out_channels), atol=1e-5)
    for p, part in enumerate(parts):
        norm, mean, hessian = reference(part)
        own = stats.hessian if groups == 1 else stats.hessian[p]
        torch.testing.assert_close(own.double(), hessian, rtol=1e-4, atol=1e-6)
        for got, want in ((stats.input_norm, norm), (stats.input_mean, mean)):
            got = got[None] if groups == 1 else got[p * rows : (p + 1) * rows]
            torch.testing.assert_close(got.flatten(1).double(), want.expand(len(got), -1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("conv", "shape"), [(nn.Conv1d(2, 3, 3, padding=1), (4, 2, 7)), (nn.Conv3d(2, 3, 2), (2, 2, 4, 5, 3))]
)
def test_hessians_of_other_convolutions_give_the_energy_of_the_output(conv, shape):
    conv.bias = None
    x = torch.randn(shape)
    stats = collect(nn.Sequential(conv), select(nn.Sequential(conv)), [x], {"hessian"})["0.weight"]
    y = conv(x).double().transpose(0, 1).flatten(1)
    rows = conv.weight.detach().flatten(1).double()
    energy = (rows @ stats.hessian.double() * rows).sum(dim=1) * y.shape[1] / 2
    torch.testing.assert_close(energy, y.square().sum(dim=1).detach(), rtol=1e-4, atol=1e-6)


def test_trap_32_half_precision_inputs_do_not_overflow():
    """The squares of what fp16 (or bf16) can hold are far beyond it, and those of bf16 beyond float32 too."""
    model = nn.Sequential(nn.Linear(2, 2)).half()
    stats = collect(model, select(model), [torch.full((1000, 2), 60000.0, dtype=torch.float16)], BOTH)["0.weight"]
    torch.testing.assert_close(stats.input_norm, torch.full((2,), 60000.0 * 1000**0.5), rtol=1e-3, atol=0)
    torch.testing.assert_close(stats.input_mean, torch.full((2,), 60000.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(stats.hessian, torch.full((2, 2), 2 * 60000.0**2), rtol=1e-3, atol=0)
    huge = nn.Sequential(nn.Linear(2, 2)).bfloat16()
    stats = collect(huge, select(huge), [torch.full((4, 2), 1e30, dtype=torch.bfloat16)])["0.weight"]
    torch.testing.assert_close(stats.input_norm, torch.full((2,), 2e30), rtol=1e-2, atol=0)


def test_autocast_does_not_lower_the_sums():
    model = nn.Sequential(nn.Linear(64, 4))
    x = torch.randn(512, 64)

    def lowered(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch)

    stats = collect(model, select(model), [x], BOTH, forward=lowered)["0.weight"]
    agree(stats, x, rtol=1e-5)


# -- experts


def expert_inputs(model, batch, layer):
    """What each expert of a Mixtral layer multiplies, by hand: ``[(x of gate_up_proj, x of down_proj)]``."""
    experts = model.model.layers[layer].mlp.experts
    seen = []
    with experts.register_forward_pre_hook(lambda m, args: seen.append(args)), torch.no_grad():
        model(**batch)
    hidden, chosen, _ = seen[0]
    found = []
    for e in range(experts.num_experts):
        x = hidden[(chosen == e).any(dim=1)]
        gate, up = (x @ experts.gate_up_proj[e].T).chunk(2, dim=-1)
        found.append((x, (experts.act_fn(gate) * up).detach()))
    return found


def test_fused_experts_each_see_their_own_tokens():
    model, batches = hf_models.mixtral(), hf_models.token_batches()
    layers, _ = pruning_targets(model)
    stats = collect(model, layers, batches, BOTH)
    by_batch = [expert_inputs(model, batch, 1) for batch in batches]
    for e in range(4):
        agree(stats["model.layers.1.mlp.experts.gate_up_proj"], torch.cat([b[e][0] for b in by_batch]), (e, 4))
        agree(stats["model.layers.1.mlp.experts.down_proj"], torch.cat([b[e][1] for b in by_batch]), (e, 4))
    assert model.config._experts_implementation == "grouped_mm"  # as it was


class Experts(nn.Module):
    def __init__(self, how, out=6):
        super().__init__()
        self.how = how
        self.is_transposed = how.endswith("transposed")
        shape = (3, 8, out) if self.is_transposed else (3, out, 8)
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x):  # [experts, tokens, in]
        w = self.weight
        if self.how == "linear":
            return torch.stack([F.linear(x[e], w[e], torch.zeros(w.shape[1])) for e in range(3)])
        if self.how == "halves":
            each = [torch.cat([F.linear(x[e], h) for h in w[e].chunk(2)], dim=-1) for e in range(3)]
            return torch.stack(each)
        if self.how == "interleaved":
            each = [torch.stack([x[e] @ w[e, i::2].T for i in (0, 1)], dim=-1).flatten(1) for e in range(3)]
            return torch.stack(each)
        if self.how == "vectors":
            return torch.stack([torch.stack([w[e] @ row for row in x[e]]) for e in range(3)])
        if self.how == "left":
            return torch.stack([(w[e] @ x[e].T).T for e in range(3)])
        if self.how == "bmm":
            return torch.bmm(x, w.transpose(1, 2))
        if self.how == "baddbmm":
            return torch.baddbmm(torch.zeros(3, 1, w.shape[1]), x, w.mT)
        if self.how == "einsum":
            return torch.einsum("eti,eoi->eto", x, w)
        if self.how == "unbind":
            return torch.stack([a @ b.T for a, b in zip(x, w.unbind(), strict=True)])
        if self.how == "grouped":
            ends = torch.tensor([x.shape[1] * (e + 1) for e in range(3)], dtype=torch.int32)
            return F.grouped_mm(x.flatten(0, 1), w.mT, offs=ends).unflatten(0, (3, -1))
        if self.how == "matmul transposed":
            return torch.stack([x[e] @ w[torch.tensor(e)] for e in range(3)])
        if self.how == "bmm transposed":
            return x @ w
        raise AssertionError(self.how)


HOWS = ["linear", "halves", "interleaved", "vectors", "left", "bmm", "baddbmm", "einsum", "unbind", "grouped"]
HOWS += ["matmul transposed", "bmm transposed"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("out", [6, 8])
def test_every_way_to_multiply_a_stack_is_seen(how, out):
    model = nn.ModuleDict({"experts": Experts(how, out)})
    layers = select(model, stacks=True)
    x = torch.randn(3, 7, 8)
    stats = collect(model, layers, [x], BOTH, forward=lambda m, b: m["experts"](b))["experts.weight"]
    for e in range(3):
        agree(stats, x[e], (e, 3))
    w = layers["experts.weight"].matrix(model["experts"].weight).unflatten(0, (3, -1))
    torch.testing.assert_close(model["experts"](x), torch.einsum("eti,eoi->eto", x, w))


@pytest.mark.parametrize("how", ["linear", "bmm transposed"])
@pytest.mark.parametrize("square", [False, True])
def test_a_stack_that_lies_the_other_way_round_is_refused(how, square):
    experts = Experts(how, 8 if square else 6)
    experts.is_transposed = not experts.is_transposed
    model = nn.ModuleDict({"experts": experts})
    with pytest.raises(ValueError, match=r"'experts.weight' .* is multiplied as .*; say so by is_transposed"):
        collect(model, select(model, stacks=True), [torch.randn(3, 7, 8)], forward=lambda m, b: m["experts"](b))


def test_weights_that_are_copied_or_cut_are_refused():
    class Copied(Experts):
        def forward(self, x):
            return torch.bmm(x, self.weight.clone().mT)

    class Cut(Experts):
        def forward(self, x):
            return torch.bmm(x[..., :3], self.weight.mT[:, :3])

    for kind, text in ((Copied, "'experts.weight' ran, but what it is"), (Cut, "in pieces of 3 of its 8 inputs")):
        model = nn.ModuleDict({"experts": kind("bmm")})
        with pytest.raises(ValueError, match=text):
            collect(model, select(model, stacks=True), [torch.randn(3, 7, 8)], forward=lambda m, b: m["experts"](b))


def test_trap_31_an_expert_without_tokens_is_named_and_falls_back_to_magnitude():
    model = hf_models.mixtral(layers=1)
    layers, _ = pruning_targets(model)
    batches = [{"input_ids": torch.zeros(1, 1, dtype=torch.long)}]  # one token reaches two of four experts
    seen = {e for e in range(4) if len(expert_inputs(model, batches[0], 0)[e][0])}
    first, second = sorted({0, 1, 2, 3} - seen)
    text = rf"mlp.experts.gate_up_proj': experts {first}, {second} of 4 saw no input; norms are taken as 1"
    with pytest.warns(UserWarning, match="mlp.experts.down_proj"), pytest.warns(UserWarning, match=text):
        stats = collect(model, layers, batches, BOTH)
    one = stats["model.layers.0.mlp.experts.gate_up_proj"]
    for e in (first, second):
        assert (one.input_norm.chunk(4)[e] == 1).all()
        assert (one.input_mean.chunk(4)[e] == 0).all()
        assert torch.equal(one.hessian[e], torch.eye(16))
    assert torch.isfinite(one.input_norm).all()
    assert torch.isfinite(one.hessian).all()


# -- padding


@pytest.mark.parametrize("make", [hf_models.llama, hf_models.mixtral, hf_models.gpt_oss, hf_models.gpt2])
@pytest.mark.parametrize("left", [False, True])
def test_trap_30_padding_counts_nowhere_not_even_behind_a_router(make, left):
    model = make()
    padded, alone = hf_models.padded_and_not(left=left)
    if left and make is hf_models.gpt2:  # absolute positions: the same texts have to stand where they stood alone
        padded[0]["position_ids"] = (padded[0]["attention_mask"].cumsum(1) - 1).clamp(min=0)
    layers, _ = pruning_targets(model)
    stats, expected = (collect(model, layers, batches, BOTH) for batches in (padded, alone))
    for name in layers:
        for field in ("input_norm", "input_mean", "hessian"):
            got, want = getattr(stats[name], field), getattr(expected[name], field)
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_trap_30_experts_that_are_modules_see_no_padding_either():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x, attention_mask=None):
            flat = x.reshape(-1, 4)
            chosen = (flat[:, 0] > 0).long()
            out = torch.zeros_like(flat)
            for e, expert in enumerate(self.experts):
                (rows,) = torch.where(chosen == e)
                out.index_add_(0, rows, expert(flat[rows].relu()))
            return out

    model, x = Routed(), torch.randn(3, 6, 4)
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    stats = collect(model, select(model), [{"x": x, "attention_mask": mask}], BOTH)
    real = x[mask.bool()]
    for e in range(2):
        agree(stats[f"experts.{e}.weight"], real[(real[:, 0] > 0) == bool(e)].relu())


def test_trap_30_rows_that_a_router_sorted_by_expert_are_followed():
    """The way of grouped products: all rows in the order of their experts, which a permutation says."""

    class Sorted(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.weight, self.how = nn.Parameter(torch.randn(2, 8, 8)), how
            self.router = nn.Linear(8, 2)

        def forward(self, x, attention_mask=None):
            flat = x.flatten(0, 1)
            values, chosen = self.router(flat).topk(1, dim=-1)
            order = chosen.flatten().argsort(stable=True)
            rows = values.sigmoid()[order] * flat[order]
            ends = torch.bincount(chosen.flatten(), minlength=2).cumsum(0).int()
            if self.how == "grouped":
                return F.grouped_mm(rows, self.weight.mT, offs=ends)
            end = int(ends[0])
            first, second = (rows[:end], rows[end:]) if self.how == "sliced" else rows.split([end, len(rows) - end])
            return torch.cat([first @ self.weight[0].T, second @ self.weight[1].T])

    x, mask = torch.randn(3, 6, 8), torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    for how in ("grouped", "split", "sliced"):
        model = Sorted(how)
        stats = collect(model, select(model, include="weight"), [{"x": x, "attention_mask": mask}], BOTH)["weight"]
        real = x[mask.bool()]
        values, chosen = model.router(real).detach().max(dim=-1)
        for e in range(2):
            agree(stats, (values.sigmoid()[:, None] * real)[chosen == e], (e, 2))


@pytest.mark.parametrize("how", ["more rows", "flipped"])
def test_rows_that_cannot_be_followed_are_said(how):
    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, attention_mask=None):
            flat = x.flatten(0, 1)
            return self.fc(torch.cat([flat, torch.zeros(1, 4)]) if how == "more rows" else flat.flip(0).relu())

    model = Shuffled()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    with pytest.warns(UserWarning, match=r"padding could not be told from tokens in the inputs of 'fc.weight'"):
        collect(model, select(model), [{"x": torch.randn(2, 3, 4), "attention_mask": mask}])


def test_trap_34_masks_of_every_kind_or_none():
    x = torch.randn(2, 4, 3)
    real = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    causal = torch.ones(4, 4, dtype=torch.bool).tril() & real[:, None, :] & real[:, :, None]
    added = torch.zeros(2, 1, 4, 4).masked_fill(~causal[:, None], torch.finfo(torch.float32).min)
    infinite = torch.zeros(2, 1, 4, 4).masked_fill(~causal[:, None], -torch.inf)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x, attention_mask=None):
            return self.fc(x)

    model = Model()
    for mask in (real, real.long(), real.float(), causal[:, None], causal[:, None].long(), added, infinite):
        agree(collect(model, select(model), [{"x": x, "attention_mask": mask}], BOTH)["fc.weight"], x[real])
    for batch in ({"x": x}, {"x": x, "attention_mask": None}, {"x": x, "attention_mask": torch.ones(2, 4)}):
        agree(collect(model, select(model), [batch], BOTH)["fc.weight"], x)
    assert padding_masks(x) == {}
    assert padding_masks({"attention_mask": torch.ones(2, 4)}) == {}


def test_encoder_and_decoder_have_masks_of_their_own():
    model = hf_models.t5()
    layers, _ = pruning_targets(model)
    ids, mask = torch.randint(1, 48, (2, 6)), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    out, out_mask = torch.randint(1, 48, (2, 6)), torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6])
    both = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": out, "decoder_attention_mask": out_mask}
    alone = [
        {"input_ids": ids[:1], "decoder_input_ids": out[:1, :2]},
        {"input_ids": ids[1:, :3], "decoder_input_ids": out[1:]},
    ]
    stats, expected = (collect(model, layers, batches, BOTH) for batches in ([both], alone))
    for name in layers:
        if "EncDecAttention.k" in name or "EncDecAttention.v" in name:
            continue  # encoder states in the decoder: of two masks of one shape the name chooses
        torch.testing.assert_close(stats[name].hessian, expected[name].hessian, rtol=1e-3, atol=1e-4)


# -- attention of torch


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(batch_first):
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    model = nn.ModuleDict({"attention": attention})
    q, k, v = (torch.randn(3, 5, 8) for _ in range(3))
    layers = select(model)
    stats = collect(model, layers, [(q, k, v)], BOTH, forward=lambda m, b: m["attention"](*b))
    for part, x in enumerate((q, k, v)):
        agree(stats["attention.in_proj_weight"], x, (part, 3))
    same = collect(model, layers, [q], BOTH, forward=lambda m, b: m["attention"](b, b, b))
    for part in range(3):
        agree(same["attention.in_proj_weight"], q, (part, 3))
    # The output projection: its Hessian gives the energy of what attention returns.
    y = attention(q, k, v, need_weights=False)[0].detach().reshape(-1, 8) - attention.out_proj.bias.detach()
    w = attention.out_proj.weight.detach().double()
    energy = (w @ stats["attention.out_proj.weight"].hessian.double() * w).sum(dim=1) * len(y) / 2
    torch.testing.assert_close(energy, y.double().square().sum(dim=0), rtol=1e-4, atol=1e-6)


def test_an_encoder_of_torch_without_padding():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2).eval()
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])

    def forward(model, batch):
        hidden = None if batch.get("attention_mask") is None else batch["attention_mask"] == 0
        return model(batch["x"], src_key_padding_mask=hidden)

    layers = select(model)
    padded = collect(model, layers, [{"x": x, "attention_mask": mask}], BOTH, forward=forward)
    alone = collect(model, layers, [{"x": x[:1, :3]}, {"x": x[1:]}], BOTH, forward=forward)
    for name in layers:
        torch.testing.assert_close(padded[name].hessian, alone[name].hessian, rtol=1e-3, atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_layer_found_by_name_is_a_plain_matrix():
    """A router's weight (no module of a known type), named by the user."""
    model = hf_models.mixtral(layers=1)
    layers = select(model, include="*.mlp.gate")
    assert isinstance(layers["model.layers.0.mlp.gate.weight"], Layer)
    seen = []
    with model.model.layers[0].mlp.gate.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach())):
        stats = collect(model, layers, hf_models.token_batches(2), BOTH)
    agree(stats["model.layers.0.mlp.gate.weight"], torch.cat([s.reshape(-1, 16) for s in seen]))
