"""A layer whose pruned weights learn: RESU in full precision, QRESU over 4-bit weights, both by an optimizer.

Run: python examples/resurrection_layer.py
"""

import torch
import torch.nn.functional as F

from resu import RESULinear, memory_report, resurrection_parameters

torch.manual_seed(0)
torch.set_num_threads(1)

# A linear map to learn again after pruning.
layer = RESULinear(256, 128)
x = torch.randn(512, 256)
target = layer(x).detach()


def steps(optimizer, count=50):
    for _ in range(count):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


layer.prune_by_magnitude(0.7)
print(f"pruned to {layer.sparsity:.3f}: loss {F.mse_loss(layer(x), target).item():.5f}")
active = layer.mask.get_active(layer.weight.detach().clone())

# RESU: `weight` holds active values and θ; the optimizer moves θ and nothing else.
layer.enter_resu_mode(epsilon=0.1)
loss = steps(torch.optim.AdamW([layer.weight], lr=3e-3, weight_decay=0.01))
same = torch.equal(active, layer.mask.get_active(layer.weight.detach()))
print(f"RESU:  loss {loss:.5f}; active weights bit-identical: {same}")
layer.exit_resu_mode(commit=False)  # True would keep θ as weights

# QRESU: active values in 4 bits, θ one contiguous parameter, the dense weight gone.
layer.enter_qresu_mode(bits=4, epsilon=0.1)
assert layer._theta is resurrection_parameters(layer)[0]
optimizer = torch.optim.Adam([layer._theta], lr=3e-3)
print(f"QRESU: loss {steps(optimizer):.5f}")
print(memory_report(layer, optimizer))
layer.exit_qresu_mode(commit=True)
print(f"committed: mode {layer.mode.name}, loss {F.mse_loss(layer(x), target).item():.5f}")
