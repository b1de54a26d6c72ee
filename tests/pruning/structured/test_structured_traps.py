"""What other tools get wrong: each either gives the masked model, or is refused with the reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resu.pruning.structured.groups import find_structure
from resu.pruning.structured.pruner import StructuredPruner
from resu.pruning.structured.verify import compare, double_copy, random_like

TOLERANCE = 1e-9


def prune(model, inputs, sparsity=0.5, **options):
    """Pruned, and compared here again with a masked copy made before, on inputs of our own."""
    torch.manual_seed(0)
    for p in model.parameters():
        if p.ndim < 2:  # norms at 1 and biases at 0 would hide mistakes
            nn.init.uniform_(p, 0.5, 1.5)
    before = double_copy(model)
    result = StructuredPruner(sparsity, inputs, **options).prune(model)
    tensors = {**dict(before.named_parameters()), **dict(before.named_buffers())}
    with torch.no_grad():
        for name, dims in result.slices.items():
            for dim, kept in dims.items() if not name.endswith((".original1", "weight_v")) else ():
                gone = torch.tensor([i for i in range(tensors[name].shape[dim]) if i not in set(kept.tolist())])
                tensors[name].index_fill_(dim, gone, 0.0)
    for seed in range(3):
        drawn = random_like(inputs, torch.Generator().manual_seed(100 + seed))
        check = compare(before, double_copy(model), drawn, TOLERANCE)
        assert check, check.reason
    return result


class SwiGLU(nn.Module):
    def __init__(self, split, dim=6, hidden=8):
        super().__init__()
        self.up, self.down, self.split, self.hidden = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, 3), split, hidden

    def forward(self, x):
        h = self.up(x)
        if self.split == "chunk":
            a, b = h.chunk(2, dim=-1)
        elif self.split == "split":
            a, b = h.split(self.hidden, dim=-1)
        elif self.split == "slice":
            a, b = h[..., : self.hidden], h[..., self.hidden :]
        elif self.split == "half":
            a, b = h[..., : h.shape[-1] // 2], h[..., h.shape[-1] // 2 :]
        elif self.split == "interleaved":
            a, b = h[..., ::2], h[..., 1::2]
        elif self.split == "glu":
            return self.down(F.glu(h, -1))
        else:
            a, b = h.unflatten(-1, (2, -1)).unbind(-2)
        return self.down(F.silu(a) * b)


@pytest.mark.parametrize("split", ["chunk", "split", "slice", "half", "interleaved", "glu", "unbind"])
def test_halves_of_swiglu_stay_aligned(split):
    model = SwiGLU(split)
    result = prune(model, torch.zeros(2, 5, 6))
    assert result.units["up"] == (8, 4)
    assert model.up.out_features == 8
    assert model.down.in_features == 4
    assert model.hidden == 4


def test_halves_of_a_literal_size_are_refused():
    class Literal(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 16), nn.Linear(8, 3)

        def forward(self, x):
            h = self.up(x)
            return self.down(F.silu(h[..., :8]) * h[..., 8:])

    with pytest.raises(ValueError, match=r"nothing can be removed.*up"):
        prune(Literal(), torch.zeros(2, 6))


class Attention(nn.Module):
    """Grouped queries; ``fused``: how q, k and v are made of one layer."""

    def __init__(self, dim=12, heads=4, kv=None, size=5, fused="", derived=False):
        super().__init__()
        kv = kv or heads
        self.num_heads, self.num_kv_heads, self.head_dim, self.fused, self.derived = heads, kv, size, fused, derived
        self.dim = heads * size
        if fused:
            self.qkv = nn.Linear(dim, (heads + 2 * kv) * size)
        else:
            self.q = nn.Linear(dim, heads * size)
            self.k, self.v = nn.Linear(dim, kv * size), nn.Linear(dim, kv * size)
        self.out = nn.Linear(heads * size, dim)

    def forward(self, x):
        b, s, _ = x.shape
        h, kv, d = self.num_heads, self.num_kv_heads, self.head_dim
        if self.fused == "chunk":
            q, k, v = (t.view(b, s, h, d).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        elif self.fused == "view":
            q, k, v = self.qkv(x).view(b, s, 3, h, d).permute(2, 0, 3, 1, 4)
        elif self.fused == "heads first":
            q, k, v = self.qkv(x).view(b, s, h, 3, d).permute(3, 0, 2, 1, 4)
        elif self.fused == "split":
            parts = self.qkv(x).split([h * d, kv * d, kv * d], -1)
            q, k, v = (t.view(b, s, -1, d).transpose(1, 2) for t in parts)
        else:
            d = self.dim // h if self.derived else d
            q, k, v = (t.view(b, s, -1 if not self.derived else n, d).transpose(1, 2) for t, n in (
                (self.q(x), h), (self.k(x), kv), (self.v(x), kv)))  # fmt: skip
        if kv != h:
            k, v = k.repeat_interleave(h // kv, 1), v.repeat_interleave(h // kv, 1)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, -1))


@pytest.mark.parametrize("fused", ["", "chunk", "view", "heads first"])
def test_heads_go_whole(fused):
    model = Attention(fused=fused)
    result = prune(model, torch.zeros(2, 7, 12))
    assert result.units["qkv" if fused else "q"] == (4, 2)
    assert model.num_heads == 2
    assert model.out.in_features == 10


def test_sizes_that_follow_from_others_are_refused_or_right():
    model = Attention(derived=True)
    assert prune(model, torch.zeros(2, 7, 12)).units["q"] == (4, 2)  # dim and num_heads both follow


@pytest.mark.parametrize("fused", ["", "split"])
def test_grouped_queries_lose_whole_groups(fused):
    model = Attention(heads=6, kv=3, fused=fused)
    result = prune(model, torch.zeros(1, 7, 12), 0.34)
    assert list(result.units.values()) == [(3, 2)]
    assert (model.num_heads, model.num_kv_heads, model.out.in_features) == (4, 2, 20)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed(x)
        return self.lm_head(h + self.down(F.gelu(self.up(h))))


def test_tied_weights_stay_tied():
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.arange(5)[None]).sum().backward()
    optimizer.step()
    result = StructuredPruner(0.5, torch.arange(5)[None]).prune(model, optimizer)
    assert model.lm_head.weight is model.embed.weight
    assert model.embed.weight.shape == (11, 4)
    assert result.units == {"embed": (8, 4), "up": (16, 8)}
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}
    model = Tied()
    prune(model, torch.arange(5)[None])


@pytest.mark.parametrize("norm", ["parametrized", "hook"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norm(norm):
    wrap = nn.utils.parametrizations.weight_norm if norm == "parametrized" else nn.utils.weight_norm
    model = nn.Sequential(wrap(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), wrap(nn.Linear(6, 3)))
    result = prune(model, torch.zeros(2, 4))
    assert result.units == {"0": (8, 4)}
    assert model[0].out_features == 4
    assert model[0].weight.shape == (4, 4)
    assert "weight norm" in result.fixed["2"]
    model(torch.zeros(2, 4)).sum().backward()


def test_grouped_and_depthwise_convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 12, 1),
        nn.Conv2d(12, 24, 3, groups=12), nn.Conv2d(24, 5, 1),
    )  # fmt: skip
    result = prune(model, torch.zeros(1, 3, 7, 7))
    assert result.units == {"0": (2, 1), "2": (2, 1), "4": (12, 6)}
    assert (model[2].in_channels, model[2].out_channels, model[2].groups) == (4, 4, 4)
    assert (model[5].in_channels, model[5].out_channels, model[5].groups) == (6, 12, 6)


def test_transposed_convolutions():
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 8, 2), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, groups=4),
        nn.ConvTranspose2d(8, 8, 2, groups=8), nn.ConvTranspose2d(8, 2, 3),
    )  # fmt: skip
    result = prune(model, torch.zeros(1, 3, 5, 5))
    assert result.units
    assert model[3].groups == model[3].in_channels == model[3].out_channels == 4


def test_multihead_attention_is_refused_and_the_rest_is_not():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    result = prune(layer, torch.zeros(2, 5, 8))
    assert result.units == {"linear1": (16, 8)}
    assert {"self_attn", "self_attn.out_proj", "linear2"} <= set(result.fixed)

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.attention, self.last = nn.Linear(6, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

        def forward(self, x):
            h = self.first(x)
            return self.last(self.attention(h, h, h)[0])

    structure = find_structure(Alone(), torch.zeros(4, 2, 6))
    assert "MultiheadAttention" in structure.fixed["first"]
    assert "MultiheadAttention" in structure.fixed["attention"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_lose_inputs_only(kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rnn, self.last = nn.Linear(4, 8), kind(8, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(F.relu(self.rnn(F.relu(self.first(x)))[0]))

    model = Recurrent()
    result = prune(model, torch.zeros(2, 5, 4))
    assert result.units == {"first": (8, 4)}
    assert model.rnn.input_size == 4
    assert model.rnn.weight_ih_l0.shape[1] == 4
    assert model.rnn._flat_weights[0] is model.rnn.weight_ih_l0
    assert result.fixed["rnn"]
    model(torch.zeros(2, 5, 4)).sum().backward()


def test_pixel_shuffle_takes_whole_pixels():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.PixelShuffle(2), nn.Conv2d(4, 2, 1))
    result = prune(model, torch.zeros(1, 3, 6, 6))
    assert result.units == {"0": (4, 2)}
    assert model[0].out_channels == 8


def test_group_norm_loses_whole_groups():
    for affine in (True, False):
        model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12, affine=affine), nn.ReLU(), nn.Conv2d(12, 2, 1))
        result = prune(model, torch.zeros(1, 3, 6, 6))
        assert result.units == {"0": (4, 2)}
        assert (model[1].num_groups, model[1].num_channels) == (2, 6)
    one = nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(1, 12), nn.Conv2d(12, 2, 1))
    with pytest.raises(ValueError, match="nothing to remove"):
        prune(one, torch.zeros(1, 3, 6, 6))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_over_channels_fix_them(norm):
    model = nn.Sequential(nn.Linear(4, 8), norm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    result = prune(model, torch.zeros(2, 4))
    assert result.units == {"2": (8, 4)}
    assert "0" in result.fixed


def test_concatenated_branches():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(12, 6, 1)
            self.norm, self.last = nn.BatchNorm2d(12), nn.Conv2d(18, 2, 1)

        def forward(self, x):
            a = self.a(x).relu()
            ab = torch.cat([a, self.b(a)], 1)
            return self.last(torch.cat([ab, self.c(self.norm(ab)).relu()], 1))

    model = Dense()
    result = prune(model, torch.zeros(1, 3, 6, 6))
    assert result.units == {"a": (8, 4), "b": (4, 2), "c": (6, 3)}
    assert model.norm.num_features == 6
    assert model.last.in_channels == 9


def test_flattened_channels_own_all_their_columns():
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 9, 4))
    result = prune(model, torch.zeros(1, 1, 8, 8))
    assert result.units == {"0": (6, 3)}
    assert model[4].in_features == 27


def test_sizes_of_views_that_modules_hold():
    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.flat = nn.Conv2d(1, 6, 3), nn.Linear(54, 4), 54

        def forward(self, x):
            return self.fc(F.max_pool2d(self.conv(x).relu(), 2).view(-1, self.flat))

    model = Viewed()
    prune(model, torch.zeros(2, 1, 8, 8))
    assert model.flat == 27


def test_a_layer_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(self.shared(self.shared(self.first(x)).relu()).relu())

    model = Twice()
    result = prune(model, torch.zeros(2, 4))
    assert result.units == {"first": (8, 4)}
    assert model.shared.weight.shape == (4, 4)


def test_functional_weights_and_buffers():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4))
            self.scale = nn.Parameter(torch.rand(8) + 0.5)
            self.register_buffer("offset", torch.rand(8))
            self.register_buffer("constant", torch.rand(8), persistent=False)
            self.last, self.other = nn.Linear(8, 2), nn.Linear(4, 8)

        def forward(self, x):
            h = F.linear(x, self.weight) * self.scale + self.offset
            return self.last(h.relu()) + self.last(self.constant.relu() * h.new_ones(1))

    model = Functional()
    with pytest.raises(ValueError, match="not saved"):
        prune(model, torch.zeros(2, 4))

    class Plain(Functional):
        def forward(self, x):
            return self.last((F.linear(x, self.weight) * self.scale + self.offset).relu())

    model = Plain()
    result = prune(model, torch.zeros(2, 4))
    assert result.units == {"weight": (8, 4)}
    assert model.offset.shape == model.scale.shape == (4,)
    assert model.other.weight.shape == (8, 4)  # not used: left alone


def test_weights_stored_inputs_first():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.last = nn.Parameter(torch.randn(4, 8)), nn.Linear(8, 2)

        def forward(self, x):
            return self.last((x @ self.weight).relu())

    model = Raw()
    assert list(prune(model, torch.zeros(2, 4)).units.values()) == [(8, 4)]
    assert model.weight.shape == (4, 4)


def test_a_gate_that_is_not_zero_at_zero():
    class Gated(nn.Module):
        """Squeeze and excitation: sigmoid(0) is a half, which nothing reads any more."""

        def __init__(self):
            super().__init__()
            self.conv, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.conv(x)
            gate = self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
            return self.last(x * gate + torch.sigmoid(x))

    model = Gated()
    result = prune(model, torch.zeros(1, 3, 6, 6))
    assert result.units == {"conv": (8, 4), "down": (4, 2)}


def test_weights_used_around_the_parameter_are_fixed():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.same = [self.b.weight.data]

        def forward(self, x):
            return self.c(self.b(self.a(x).relu() @ self.same[0].T).relu())

    structure = find_structure(Around(), torch.zeros(2, 4))
    assert "around the parameter" in structure.fixed["b"]


def test_unknown_operations_are_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 9), nn.Linear(9, 2)

        def forward(self, x):
            return self.b(torch.cdist(self.a(x)[None], self.a(x)[None])[0].sum() + self.a(x))

    structure = find_structure(Odd(), torch.zeros(2, 4))
    assert "_euclidean_dist" in structure.fixed["a"] or "cdist" in structure.fixed["a"]
    assert not structure.groups


def test_channel_shuffle():
    class Shuffle(nn.Module):
        def __init__(self, builtin):
            super().__init__()
            self.a, self.b, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 2, 1)
            self.groups, self.builtin = 2, builtin

        def forward(self, x):
            x = self.a(x).relu()
            if self.builtin:
                x = F.channel_shuffle(x, 2)
            else:
                n, c, h, w = x.shape
                x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
            return self.last(self.b(x))

    for builtin in (True, False):
        result = prune(Shuffle(builtin), torch.zeros(1, 3, 5, 5))
        assert result.units["b"] == (4, 2)
