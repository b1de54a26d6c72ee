"""Train a network, prune it to 90 %, and train on: the loop stays as it was, one line is added.

Run: python examples/prune_and_finetune.py        (needs scikit-learn for its handwritten digits)
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from resu.training import RESU, Sparsifier, Static

torch.manual_seed(0)
torch.set_num_threads(1)

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(x))
train, test = order[:1400], order[1400:]


def steps(model, optimizer, count):
    """An ordinary training loop; it knows nothing of sparsity."""
    for _ in range(count):
        batch = train[torch.randint(len(train), (64,))]
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model):
    return 100 * (model(x[test]).argmax(1) == y[test]).float().mean().item()


model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
steps(model, optimizer, 300)
trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
print(f"dense: {accuracy(model):.1f} %")

rules = {
    "one-shot + masked fine-tuning": Static(sparsity=0.9, init="magnitude"),
    "RESU: pruned weights may return": RESU(sparsity=0.9, initial_sparsity=None, interval=8, end_step=150),
}
for name, rule in rules.items():
    model.load_state_dict(trained)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    sparsifier = Sparsifier(model, optimizer, rule, distribution="global")  # the one line
    pruned = accuracy(model)
    steps(model, optimizer, 200)
    report = sparsifier.report()
    masks = sparsifier.commit()  # the model is plain again: nothing holds its zeros, and they stay
    print(f"{name}: {pruned:.1f} % when pruned, {accuracy(model):.1f} % after 200 steps")

print(report)
zeros = sum(int((layer.weight == 0).sum()) for layer in model if isinstance(layer, nn.Linear))
print(f"{zeros} weights are exactly zero, {sum(mask.n_pruned for mask in masks.values())} are pruned")
