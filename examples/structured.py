"""A convolutional network with half of its multiply-adds removed: verified, fine-tuned, saved, loaded.

Run: python examples/structured.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from resu.pruning.structured import StructuredPruner, load_shrunk, save_shrunk
from resu.pruning.structured.sizes import latencies


class Net(nn.Module):
    """Two residual blocks between a first convolution and a linear layer."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(4))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        for k in (0, 2):
            y = F.relu(self.norms[k](self.convs[k](x)))
            x = F.relu(x + self.norms[k + 1](self.convs[k + 1](y)))
        return self.head(x.mean((2, 3)))


torch.manual_seed(0)
model, dense = Net(), Net()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
images, labels = torch.randn(32, 3, 16, 16), torch.randint(10, (32,))


def train(steps: int) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    return loss.item()


print(f"loss before {train(5):.3f}")
pruner = StructuredPruner(
    0.5,
    images[:1],
    target="macs",
    scope="global",
    importance="taylor",
    round_to=8,
    calibration=[(images, labels)],
    loss_fn=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]),
)
result = pruner.prune(model, optimizer)
print(result)
print(f"differs from the masked model by {result.error:.1e} of the largest output")
print(f"loss after fine-tuning {train(5):.3f}")
print(f"latency {latencies([dense, model], images[:1], rounds=5).ratios[1]:.2f} of the dense one")

save_shrunk(model, "small", kept=result.slices)
again = load_shrunk(Net, "small").eval()
print("loaded, equal:", torch.equal(again(images), model.eval()(images)))
