import pytest

from resu.pruning import pruners as page
from resu.pruning.pruners import GradualPruner, MagnitudePruner, create_pruner, pruners


def test_every_public_name_is_there():
    assert all(hasattr(page, name) for name in page.__all__)


def test_create_pruner_by_name():
    made = create_pruner("magnitude", sparsity=0.8, scope="global")
    assert isinstance(made, MagnitudePruner)
    assert (made.sparsity, made.scope) == (0.8, "global")
    ramp = create_pruner("gradual", pruner=made, begin_step=2, end_step=8, frequency=2)
    assert isinstance(ramp, GradualPruner)
    assert ramp.final_sparsity == 0.8


def test_unknown_names_and_options_list_the_known():
    with pytest.raises(ValueError, match=r"unknown pruner 'magnitud'; known: gradual,.* magnitude"):
        create_pruner("magnitud")
    with pytest.raises(ValueError, match="no option 'amount'; it has: sparsity, scope"):
        create_pruner("magnitude", amount=0.5)
    with pytest.raises(ValueError, match="give a final_sparsity"):
        create_pruner("gradual")


def test_a_pruner_of_ones_own_is_one_line():
    @pruners.register("mine", replace=True)
    class Mine:
        def __init__(self, sparsity, **rest):
            self.sparsity = sparsity
            self.rest = rest

    assert create_pruner("mine", sparsity=0.3, other=1).rest == {"other": 1}
    with pytest.raises(ValueError, match="also needs sparsity"):
        create_pruner("mine")
