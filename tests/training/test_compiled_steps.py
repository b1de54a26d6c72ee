"""Steps and backward passes that are compiled: the driver stays outside, and does what it does without."""

import pytest
import torch
from torch import nn

from resu.training import RESU, SNFS, RigL, Sparsifier, Static, TopKAST

RULES = {
    "static": Static(sparsity=0.7),
    "rigl": RigL(sparsity=0.7, interval=2),
    "snfs": SNFS(sparsity=0.7, interval=2),
    "top-kast": TopKAST(sparsity=0.7, interval=2),
    "resu": RESU(sparsity=0.7, interval=2, initial_sparsity=None),
}


def trained(rule, how):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sparsifier = Sparsifier(model, optimizer, rule)

    def step():
        optimizer.step()

    if how == "optimizer":
        step = torch.compile(step, backend="aot_eager")
    seen = []
    for x in torch.randn(6, 5, 8):
        optimizer.zero_grad()
        loss = model(x).square().sum()
        if how == "backward":
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
                loss.backward()
        else:
            loss.backward()
        seen += [model.get_parameter(name).grad.clone() for name in sparsifier.masks]
        step()
        for name, mask in sparsifier.masks.items():
            assert not model.get_parameter(name).detach()[~mask.mask].any()
    return seen, [p.detach() for p in model.parameters()], sparsifier.masks


@pytest.mark.parametrize("how", ["optimizer", "backward"])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself and what it leaves out
def test_a_compiled_step_does_what_a_plain_one_does(name, how):
    gradients, weights, masks = trained(RULES[name], how)
    plain = trained(RULES[name], "plainly")
    for got, expected in zip(gradients, plain[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    for got, expected in zip(weights, plain[1], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert masks == plain[2]
