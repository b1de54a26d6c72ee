"""Cycles that prune, train what was pruned, and let a tournament decide who comes back.

Run: python examples/cycle.py        (needs scikit-learn for its handwritten digits)
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from resu import RESUConfig, RESUTrainer

torch.manual_seed(0)
torch.set_num_threads(1)

digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
order = torch.randperm(len(x))
train, test = order[:1400], order[1400:]
loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=64, shuffle=True)


def train_step(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


@torch.no_grad()
def accuracy(model):
    return 100 * (model(x[test]).argmax(1) == y[test]).float().mean().item()


model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
config = RESUConfig(target_sparsity=0.8, num_cycles=4, steps_per_cycle=80, resu_lr=2e-3)
trainer = RESUTrainer(model, config, optimizer, train_step, accuracy)

for stats in trainer.train(loader):
    print(
        f"cycle {stats.cycle}: sparsity {stats.actual_sparsity:.4f}, accuracy {stats.eval:.1f} %, "
        f"{stats.n_resurrected} weights came back"
    )
summary = trainer.get_training_summary()
print(f"{summary['total_steps']} steps, {summary['total_resurrected']} came back in all")
kept = sum(layer.mask.n_active for layer in trainer.layers.values())
print(f"{kept} of 17024 weights are kept")
assert kept == 3405  # 80 % of them are gone, exact to one weight
