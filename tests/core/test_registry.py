import pytest

from resu.core.registry import Registry


def test_names_come_sorted_and_unknown_ones_list_them():
    registry = Registry("score")
    registry.register("b")(2)
    registry.register("a")(1)
    assert list(registry) == ["a", "b"]
    assert len(registry) == 2
    assert "a" in registry
    assert "c" not in registry
    for name in ("c", None, ["a"]):
        with pytest.raises(ValueError, match=r"unknown score .*; known: a, b"):
            registry[name]


def test_a_name_is_taken_until_replaced():
    registry = Registry("score")
    registry.register("a")(1)
    with pytest.raises(ValueError, match="'a' is registered already; pass replace=True"):
        registry.register("a")(2)
    registry.register("a", replace=True)(2)
    assert registry["a"] == 2


def test_the_decorator_gives_its_object_back():
    registry = Registry("score")

    @registry.register("half")
    def half(x):
        return x / 2

    assert half(4) == registry["half"](4) == 2
