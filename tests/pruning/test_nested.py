import pytest
import torch

from resu.core.pattern import NM, Block, Unstructured
from resu.pruning.nested import choose_masks


def test_what_is_pruned_ranks_last_even_under_negative_scores():
    scores = {"a": torch.tensor([[-1.0, -2.0, -3.0, -4.0]]), "b": torch.tensor([[-5.0, -6.0, -7.0, -8.0]])}
    within = {"a": torch.tensor([[False, False, True, True]]), "b": torch.ones(1, 4, dtype=torch.bool)}
    masks = choose_masks(scores, 0.5, Unstructured(), "global", within)
    assert masks["a"].tolist() == [[False, False, True, True]]
    assert masks["b"].tolist() == [[True, True, False, False]]


def test_a_layer_without_its_share_left_gives_it_to_the_others():
    scores = {"a": torch.full((1, 4), 0.0), "b": torch.full((1, 4), 0.0)}
    within = {"a": torch.tensor([[False, False, False, True]])}
    masks = choose_masks(scores, 0.5, Unstructured(), "uniform", within)
    assert [int(masks[n].sum()) for n in "ab"] == [1, 3]


def test_integer_scores_and_other_patterns():
    scores = {"a": torch.arange(8).view(2, 4)}
    within = {"a": torch.tensor([[True, True, True, False], [True, True, True, True]])}
    assert choose_masks(scores, 0.5, NM(2, 4), within=within)["a"].tolist() == [
        [False, True, True, False],
        [False, False, True, True],
    ]
    blocks = choose_masks(scores, 0.5, Block(1, 2), within={"a": torch.tensor([[False, False, True, True]] * 2)})["a"]
    assert blocks.tolist() == [[False, False, True, True]] * 2
    fewer = choose_masks(scores, 0.75, Block(1, 2), within={"a": blocks})["a"]
    assert fewer.tolist() == [[False] * 4, [False, False, True, True]]


def test_nan_is_refused_by_name():
    with pytest.raises(ValueError, match="scores of 'a'"):
        choose_masks({"a": torch.tensor([[1.0, float("nan")]])}, 0.5, Unstructured())
    with pytest.raises(ValueError, match="either one sparsity"):
        choose_masks({"a": torch.ones(1, 2)}, {"a": 0.5}, Unstructured(), "global")
