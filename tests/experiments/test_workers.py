"""Runs on several processes: the order of results, errors, one thread each."""

import os

import pytest
import torch

from resu.experiments.workers import WorkerDied, default_workers, spread


def add(shared, job):
    return torch.get_num_threads(), shared + job


def fail(shared, job):
    raise ValueError(f"job {job}")


def die(shared, job):
    os._exit(3)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_in_the_order_of_the_jobs(workers):
    done = []
    before = torch.get_num_threads()
    results = spread(add, torch.tensor([1.0]), [(i,) for i in range(5)], workers, done.append)
    assert results == [(1, torch.tensor([1.0 + i])) for i in range(5)]
    assert sorted(done) == [(i,) for i in range(5)]
    assert torch.get_num_threads() == before


def test_an_error_comes_through():
    with pytest.raises(ValueError, match="job 0"):
        spread(fail, None, [(0,)], 1)


def test_a_process_that_dies_is_named():
    with pytest.raises(WorkerDied, match="processes died"):
        spread(die, None, [(0,)], 2)


def test_workers_are_cores_within_the_limit():
    assert 1 <= default_workers() <= 4
    assert default_workers(1) == 1
