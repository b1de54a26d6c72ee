"""Globs over names of parameters and of their modules."""

import pytest

from resu.core.globs import glob_list, glob_matches, listing


@pytest.mark.parametrize(
    ("glob", "name", "meant"),
    [
        ("lm_head", "lm_head.weight", True),
        ("lm_head.", "lm_head.weight", False),  # trap 13: a name with a trailing dot excludes nothing, and is an error
        ("lm_head", "model.lm_head.weight", False),
        ("*.lm_head", "model.lm_head.weight", True),
        ("weight", "weight", True),
        ("FC1", "fc1.weight", False),
        ("layers.1", "layers.10.weight", False),
        ("layers.?", "layers.1.weight", True),
    ],
)
def test_trap_13_a_glob_means_the_whole_name_of_a_parameter_or_module(glob, name, meant):
    assert glob_matches(glob, name) is meant


def test_one_several_or_none():
    assert glob_list("a*") == ["a*"]
    assert glob_list(x for x in "ab") == ["a", "b"]
    assert glob_list([]) == []
    assert glob_list(None) is None


def test_long_lists_are_cut_with_their_number():
    names = [f"{i}.weight" for i in range(30)]
    assert listing(names[:20]) == ", ".join(names[:20])
    assert listing(names) == ", ".join(names[:20]) + ", … (30 in all)"
