"""200 networks at random: never a wrong one, and most of them smaller."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from resu.pruning.structured.pruner import StructuredPruner
from resu.pruning.structured.verify import compare, double_copy, random_like
from tests.pruning.structured.random_networks import Network, blocks


def masked(model, slices):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, dims in slices.items():
            for dim, kept in dims.items():
                gone = sorted(set(range(tensors[name].shape[dim])) - set(kept.tolist()))
                tensors[name].index_fill_(dim, torch.tensor(gone), 0.0)
    return model


@pytest.mark.slow
def test_random_networks_come_out_right_or_not_at_all():
    removed = []

    @settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(blocks, st.integers(0, 2), st.sampled_from([0.25, 0.5, 0.7]), st.sampled_from(["local", "global"]))
    def run(spec, end, sparsity, scope):
        torch.manual_seed(len(spec) + end)
        model, x = Network(spec, end), torch.randn(1, 2, 4, 4)
        for p in model.parameters():
            if p.ndim < 2:
                nn.init.uniform_(p, 0.3, 1.5)
        before = double_copy(model)
        result = StructuredPruner(sparsity, x, scope=scope).prune(model)
        masked(before, result.slices)
        for seed in range(2):
            check = compare(before, double_copy(model), random_like(x, torch.Generator().manual_seed(seed)), 1e-9)
            assert check, (check.reason, result.units)
        assert all(result.refused.values())
        before_, after = result.parameters
        removed.append(1 - after / before_)
        model(x).sum().backward()

    run()
    assert len(removed) >= 200
    assert sum(fraction > 0.1 for fraction in removed) >= 0.9 * len(removed)
