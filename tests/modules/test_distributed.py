"""Two processes under DistributedDataParallel with gloo, in every mode: ranks stay equal, promises hold."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

MODES = ["dense", "sparse", "resu", "resu_selective", "qresu4", "qresu_selective"]
STEPS = 3


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _batch(rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(4, 1, 6, 6, generator=generator), torch.randint(0, 3, (4,), generator=generator)


def _model(mode):
    from resu.modules.convert import convert_to_resu, get_resu_modules
    from tests.modules.helpers import enter, small_model

    model = convert_to_resu(small_model(), exclude="5")
    torch.manual_seed(1)
    for layer in get_resu_modules(model).values():
        enter(layer, mode)
    return model


def _train(model, run, mode, batches):
    from resu.modules.base import RESUMode
    from resu.modules.convert import get_resu_modules, resurrection_parameters

    layers = get_resu_modules(model).values()
    if mode in ("dense", "sparse"):
        parameters = list(model.parameters())
    else:
        parameters = [*resurrection_parameters(model), *model[5].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    active = [None if layer.mask is None else layer.active_values().clone() for layer in layers]
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(x), y).backward()
        for layer in layers:
            if layer.mode is RESUMode.RESU and layer.settings.use_selective:
                layer.resu_step()
        optimizer.step()
    for layer, before in zip(layers, active, strict=True):
        if layer.mode is RESUMode.SPARSE:
            assert not layer.mask.get_pruned(layer.weight).any()
        elif before is not None:
            assert torch.equal(layer.active_values(), before)
    return {k: v.clone() for k, v in model.state_dict().items()}


def _worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for mode in MODES:
            model = _model(mode)
            run = nn.parallel.DistributedDataParallel(model)
            state = _train(model, run, mode, [_batch(rank, step) for step in range(STEPS)])
            torch.save(state, os.path.join(folder, f"{mode}-{rank}.pt"))
        torch.distributed.barrier()  # a rank that is done must not take its group from one that is not
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    mp.spawn(_worker, args=(_free_port(), folder), nprocs=2)
    return {
        mode: [torch.load(os.path.join(folder, f"{mode}-{rank}.pt"), weights_only=True) for rank in (0, 1)]
        for mode in MODES
    }


@pytest.mark.parametrize("mode", MODES)
def test_ranks_stay_equal(states, mode):
    first, second = states[mode]
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("mode", MODES)
def test_the_same_as_one_process_with_both_batches(states, mode):
    model = _model(mode)
    both = []
    for step in range(STEPS):
        (x0, y0), (x1, y1) = _batch(0, step), _batch(1, step)
        both.append((torch.cat([x0, x1]), torch.cat([y0, y1])))
    alone = _train(model, model, mode, both)
    for name, value in states[mode][0].items():
        torch.testing.assert_close(value, alone[name], rtol=2e-3, atol=2e-4, msg=name)
