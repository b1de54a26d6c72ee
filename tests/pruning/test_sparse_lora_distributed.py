"""Two processes with gloo, under DDP and FSDP2: the same adapters as one process with both batches."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

from resu.pruning.sparse_lora import lora_parameters, merge_all_lora_weights, validate_sparsity_preserved
from tests.pruning.lora_models import adapted

CASES = [
    ("sparse_to_dense", None, "ddp"), ("sparse_to_sparse", 4, "ddp"), ("sparse_to_dense", 4, "fsdp"),
    ("sparse_to_sparse", None, "fsdp"), ("scale", None, "fsdp"),
]  # fmt: skip
STEPS = 3


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _batch(rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(4, 4, 4, 4, generator=generator), torch.randint(0, 3, (4,), generator=generator)


def _train(run, parameters, batches):
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(run(x), y).backward()
        optimizer.step()


def _worker(rank, port, folder):
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for mode, bits, wrapper in CASES:
            model, _ = adapted(mode, base_bits=bits, dropout=0.0)
            if wrapper == "fsdp":
                for layer in model:
                    if any(True for _ in layer.parameters()):
                        fully_shard(layer)
                run = fully_shard(model)
            else:
                run = nn.parallel.DistributedDataParallel(model)
            _train(run, lora_parameters(model), [_batch(rank, step) for step in range(STEPS)])
            if wrapper == "fsdp":
                with pytest.raises(RuntimeError, match="gather the state"):
                    merge_all_lora_weights(model)
            state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}
            torch.save(state, os.path.join(folder, f"{mode}-{bits}-{wrapper}-{rank}.pt"))
        torch.distributed.barrier()  # a rank that is done must not take its group from one that is not
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    mp.spawn(_worker, args=(_free_port(), folder), nprocs=2)
    return {
        case: [
            torch.load(os.path.join(folder, f"{'-'.join(map(str, case))}-{rank}.pt"), weights_only=True)
            for rank in (0, 1)
        ]
        for case in CASES
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_same_as_one_process_with_both_batches(states, case):
    mode, bits, _ = case
    first, second = states[case]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    model, masks = adapted(mode, base_bits=bits, dropout=0.0)
    both = [[torch.cat(pair) for pair in zip(_batch(0, s), _batch(1, s), strict=True)] for s in range(STEPS)]
    _train(model, lora_parameters(model), both)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4, msg=name)
    model.load_state_dict(first)  # what was trained on several is merged on one
    merge_all_lora_weights(model, preserve_sparsity=False)
    assert validate_sparsity_preserved(model, masks, 0)[0] == (mode != "sparse_to_dense")
