"""What holds of masks and resurrection under ``cerebras.pytorch``: the real one, or the stand-in.

python cerebras_checks.py FOLDER    runs all checks with the real cerebras-pytorch of that interpreter (torch 2.4)

A plain restatement of the rule beside each run, and elementwise comparison.
"""

import sys
from pathlib import Path

import torch
from torch import nn


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def data(steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(12, 8, generator=generator), torch.randint(3, (12,), generator=generator)


def sparsified(cstorch, config, rate=0.1):
    model = network()
    sparsity = cstorch.sparse.configure(config)
    optimizer = cstorch.optim.SGD(model.parameters(), lr=rate, momentum=0.0)
    sparsity.apply(model)
    sparsity.apply(optimizer)
    return model, optimizer, sparsity


def train(model, optimizer, steps):
    for x, y in data(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def keep_top(values, sparsity):
    keep = int(values.numel() * (1 - torch.tensor(sparsity)))
    kept = torch.zeros(values.numel(), dtype=torch.bool)
    kept[values.flatten().abs().topk(keep).indices] = True
    return kept.view_as(values)


def check_tournament(cstorch, steps=13, sparsity=0.7, every=4, rate=0.1, theta_lr=0.1):
    """Every number of a run is that of a loop written out: masked SGD, normalized steps of θ, a tournament when due."""
    names = ["0.weight", "2.weight"]
    config = {
        "algorithm": "resu",
        "sparsity": sparsity,
        "init_method": "topk",
        "theta_lr": theta_lr,
        "update": {"freq": every},
        "param_filter": names,
    }
    model, optimizer, group = sparsified(cstorch, config, rate)
    group.initialize()
    plain = network()
    weights = {name: p for name, p in plain.named_parameters() if name in names}
    masks = {name: keep_top(p.detach(), sparsity) for name, p in weights.items()}
    theta = {name: torch.zeros_like(p) for name, p in weights.items()}
    born = 0
    for step, (x, y) in enumerate(data(steps), start=1):
        with torch.no_grad():
            for name, p in weights.items():
                p.mul_(masks[name])
        plain.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        with torch.no_grad():
            for name, p in plain.named_parameters():
                grad = p.grad
                if name in names:
                    pruned = ~masks[name]
                    theta[name][pruned] -= (theta_lr * grad / grad.square().mean().sqrt())[pruned]
                    grad = grad * masks[name]
                p -= rate * grad
            if step % every == 0:
                for name, p in weights.items():
                    value = torch.where(masks[name], p, theta[name])
                    now = keep_top(value, sparsity)
                    born += int((now & ~masks[name]).sum())
                    masks[name] = now
                    p.copy_(torch.where(now, value, 0.0))
                    theta[name] = torch.where(now, 0.0, value)
    train(model, optimizer, steps)
    assert born > 5, "nothing came back: the check is empty"
    state = model.state_dict()
    for name in names:
        assert torch.equal(state[f"{name}_mask"], masks[name]), name
        torch.testing.assert_close(state[name], weights[name].detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state[f"{name}_theta"], theta[name], rtol=1e-5, atol=1e-6)
        assert (state[name][~masks[name]] == 0).all()
        assert (state[f"{name}_theta"][masks[name]] == 0).all()
    return model, group


def check_gradients_that_overflow(cstorch):
    """They move neither θ nor masks into NaN."""
    config = {"algorithm": "resu", "sparsity": 0.5, "init_method": "topk", "param_filter": ["0.weight"]}
    model, optimizer, group = sparsified(cstorch, {**config, "theta_lr": 0.1, "update": {"freq": 100}})
    group.initialize()
    train(model, optimizer, 2)
    before = model[0].weight_theta.clone()
    assert before.abs().max() > 0
    (nn.functional.cross_entropy(model(torch.randn(4, 8)), torch.zeros(4, dtype=torch.int64)) * float("inf")).backward()
    assert torch.equal(model[0].weight_theta, before)


def check_resuming(cstorch):
    """A state has θ and masks; one without θ begins at 0."""
    config = {"algorithm": "resu", "sparsity": 0.6, "init_method": "topk", "theta_lr": 0.02, "update": {"freq": 3}}
    model, optimizer, group = sparsified(cstorch, {**config, "param_filter": ["0.weight"]})
    group.initialize()
    train(model, optimizer, 4)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert {"0.weight_mask", "0.weight_theta"} <= set(state)
    other, _, group = sparsified(cstorch, {**config, "param_filter": ["0.weight"]})
    other.load_state_dict(state)
    group.initialize()  # masks that were loaded stay
    assert all(torch.equal(a, state[name]) for name, a in other.state_dict().items())
    del state["0.weight_theta"]
    other.load_state_dict(state)
    assert other[0].weight_theta.abs().max() == 0


def check_masks_as_tensors(cstorch, folder, load):
    """A checkpoint with masks among the tensors: they are the masks, kept zeros included."""
    from resu.integrations.cerebras.export import write_checkpoint

    model = network()
    keep = torch.rand(16, 8) < 0.5
    keep[0, 0] = True
    with torch.no_grad():
        model[0].weight.mul_(keep)
        model[0].weight[0, 0] = 0
    write_checkpoint(model.state_dict(), {"0.weight": keep}, Path(folder) / "checkpoint_0.mdl")
    found = load(Path(folder) / "checkpoint_0.mdl")
    config = {"algorithm": "static", "sparsity": 0.5, "init_method": "from_zeros", "param_filter": ["0.weight"]}
    other, optimizer, group = sparsified(cstorch, config)
    other.load_state_dict(found["model"])
    group.initialize()
    assert torch.equal(other[0].weight_mask, keep)
    train(other, optimizer, 5)
    assert (other[0].weight[~keep] == 0).all()
    assert other[0].weight[0, 0] != 0


def check_masks_as_zeros(cstorch, weight, keep):
    """Of weights as they are exported, ``from_zeros`` makes the masks, kept zeros included."""
    config = {"algorithm": "static", "sparsity": 0.5, "init_method": "from_zeros", "param_filter": ["0.weight"]}
    model, optimizer, group = sparsified(cstorch, config)
    with torch.no_grad():
        model[0].weight.copy_(weight)
    group.initialize()
    assert torch.equal(model[0].weight_mask, keep)
    train(model, optimizer, 5)
    assert (model[0].weight[~keep] == 0).all()


if __name__ == "__main__":
    import cerebras.pytorch as cstorch

    import resu.integrations.cerebras.algorithm  # noqa: F401 (makes "resu" known)

    cstorch.backend("CPU")
    check_tournament(cstorch)
    check_gradients_that_overflow(cstorch)
    check_resuming(cstorch)
    check_masks_as_tensors(cstorch, sys.argv[1], cstorch.load)
    exported = torch.load(Path(sys.argv[1]) / "exported.pt", weights_only=True)
    check_masks_as_zeros(cstorch, exported["weight"], exported["keep"])
    print(cstorch.__version__, torch.__version__)
