"""Steps that get a closure: gradients come only inside the step, and rules must see those of this step."""

import pytest
import torch

from resu.training import Sparsifier
from resu.training.algorithms import MEST, SNFS, STE, GraNet, RigL, SRigL, TopKAST
from tests.training.helpers import batches, loss_of, mlp

RULES = {
    "rigl": RigL(sparsity=0.8, interval=2, end_step=8),
    "granet": GraNet(sparsity=0.8, interval=2, end_step=8),
    "srigl": SRigL(sparsity=0.8, interval=2, end_step=8),
    "snfs": SNFS(sparsity=0.8, interval=2, end_step=8),
    "mest": MEST(sparsity=0.8, interval=2, end_step=8, grad_weight=10.0),
    "ste": STE(sparsity=0.8, decay=0.5),
    "top-kast": TopKAST(sparsity=0.8, interval=2, regularization=0.1),
}


def run(name, how, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)):
    model = mlp()
    steps = optimizer(model.parameters())
    sparsifier = Sparsifier(model, steps, RULES[name], pattern="row" if name == "srigl" else None)
    for batch in batches(9):

        def closure(batch=batch):
            steps.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        if how == "plain":
            closure()
            steps.step()
        elif how == "keyword":
            assert steps.step(closure=closure).item() > 0
        else:
            assert steps.step(closure).item() > 0
    return model, sparsifier


@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("name", RULES)
def test_trap_20_a_step_with_a_closure_is_the_step_without(name, how):
    (one, held), (other, plain) = run(name, how), run(name, "plain")
    assert held.step == plain.step == 9
    assert held.masks == plain.masks
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", RULES)
def test_trap_20_an_optimizer_that_calls_its_closure_many_times(name):
    model, sparsifier = run(name, "positional", lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3))
    assert sparsifier.step == 9
    for key, mask in sparsifier.masks.items():
        assert not mask.get_pruned(model.get_parameter(key).detach()).any()
        assert mask.n_active == sum(mask.mask.flatten().tolist())
    assert sum(mask.n_active for mask in sparsifier.masks.values()) == 200


def test_trap_20_the_gradient_of_the_last_call_counts():
    model = mlp()
    steps = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    sparsifier = Sparsifier(model, steps, RigL(sparsity=0.8, interval=1))
    batch, seen = batches(1)[0], []

    def closure():
        steps.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        plain = mlp()
        plain.load_state_dict(model.state_dict())
        seen.append(torch.autograd.grad(loss_of(plain, batch), plain[0].weight)[0])
        return loss

    caught, update = [], type(sparsifier.algorithm).update_mask

    def spy(rule, view, sparsity, step):
        caught.append((view.name, view.gradient))
        return update(rule, view, sparsity, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RigL, "update_mask", spy)
        steps.step(closure)
    assert len(seen) > 1
    torch.testing.assert_close(dict(caught)["0.weight"], seen[-1])
    assert not torch.allclose(seen[0], seen[-1])
