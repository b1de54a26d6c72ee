"""The page on rules says what is: a card per rule, its settings, and which patterns it keeps to."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from resu import training
from resu.core.counting import keep_count
from resu.training import Sparsifier
from resu.training.algorithms import algorithms

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "rules.md").read_text(encoding="utf-8")
CARDS = dict(re.findall(r"### `(\w+)`\n((?:.|\n)*?)(?=\n### |\Z)", PAGE.split("## The cards")[1]))
SECTION = PAGE.split("## Patterns and budgets")[1].split("\n## ")[0]
ROWS = [
    [cell.strip(" `") for cell in line.strip("|").split("|")] for line in SECTION.splitlines() if line.startswith("|")
]
PATTERNS = ROWS[0][1:]
CELLS = [(row[0], pattern, cell) for row in ROWS[2:] for pattern, cell in zip(PATTERNS, row[1:], strict=True)]
OVERVIEW = PAGE.split("## Which one")[1].split("\n## ")[0]


def test_every_rule_has_a_card_and_a_row_in_both_tables():
    kinds = [algorithms[name] for name in algorithms]
    names = {
        kind.__name__ for kind in kinds if kind.__module__.startswith("resu.")
    }  # pages register rules of their own
    assert set(CARDS) == names
    assert {row[0].split("(")[0] for row in ROWS[2:]} == names
    assert set(re.findall(r"^\| \[`(\w+)`\]", OVERVIEW, flags=re.MULTILINE)) == names


@pytest.mark.parametrize("name", CARDS)
def test_a_card_names_its_source_and_its_true_defaults(name):
    card, kind = CARDS[name], getattr(training, name)
    settings = re.search(r"- \*\*Settings\*\*: ((?:.|\n)*?)(?=\n- |\n\n)", card).group(1)
    shown = dict(re.findall(r"`(\w+)=([^`]+)`", settings))
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    for setting, value in shown.items():
        default = fields[setting]
        resolved = kind(sparsity=0.75, end_step=1000)  # what None stands for is settled when a rule is made
        assert eval(value) in (default, getattr(resolved, setting)), setting
        assert eval(value) == default
    said = set(shown) | set(re.findall(r"`(\w+)` \(required", settings))
    own = {f for f in fields if f not in ("sparsity", "begin_step", "end_step", "interval")}
    assert own <= said, f"{own - said} is not on the card"
    assert name == "RESU" or "arxiv.org/abs/" in card
    assert "**It fails**" in card
    assert "```python" in card


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 8))


def rule_of(text, sparsity):
    name, _, options = text.partition("(")
    options = eval(f"dict({options.rstrip(')')})")
    schedule = {} if name == "Static" else {"interval": 2, "end_step": 7}
    return getattr(training, name)(sparsity=sparsity, **schedule, **options)


@pytest.mark.parametrize(("rule", "pattern", "cell"), CELLS)
def test_the_table_of_patterns_is_true(rule, pattern, cell):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def build():
        return Sparsifier(model, optimizer, rule_of(rule, 0.5), pattern=pattern, distribution="uniform")

    if cell == "no":
        with pytest.raises(ValueError, match=r"SRigL keeps|SNFS moves|EM&S grows"):
            build()
        return
    assert cell in ("yes", "at once", "neurons")
    sparsifier, seen = build(), []
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 4, 6, 6, generator=generator), torch.randint(8, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        seen.append(sparsifier.sparsity)
        for name, mask in sparsifier.masks.items():
            assert not mask.get_pruned(model.get_parameter(name).detach()).any()
            pruned_to = mask.n_active < mask.numel  # ramps and dense phases: N:M holds once there is a mask
            if cell != "neurons" and (pruned_to or pattern != "2:4"):
                assert sparsifier.pattern.violations(mask.mask) == 0
    for mask in sparsifier.masks.values():
        if cell != "neurons" and rule != "SNFS":
            assert mask.n_active == sparsifier.pattern.keep_for(mask.shape, 0.5)
    total = sum(mask.numel for mask in sparsifier.masks.values())
    assert sum(mask.n_active for mask in sparsifier.masks.values()) == keep_count(total, 0.5)
    ramps = rule in ("Magnitude", "RESU", "GraNet")
    assert (cell == "at once") == (ramps and pattern == "2:4")
    if ramps:
        assert (set(seen) <= {0.0, 0.5}) == (cell == "at once")


@pytest.mark.parametrize("distribution", ["erk", "er", "uniform", "global", {"0": 0.25, "*": 0.5}])
@pytest.mark.parametrize("rule", [row[0] for row in ROWS[2:]])
def test_every_distribution_works_with_every_rule(rule, distribution):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pattern = "row" if rule == "SRigL" else None
    sparsifier = Sparsifier(model, optimizer, rule_of(rule, 0.5), pattern=pattern, distribution=distribution)
    counts = []
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 4, 6, 6, generator=generator), torch.randint(8, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        counts.append([mask.n_active for mask in sparsifier.masks.values()])
    total = sum(mask.numel for mask in sparsifier.masks.values())
    if isinstance(distribution, str):
        assert sum(counts[-1]) == keep_count(total, 0.5)
    elif not rule.startswith("SNFS"):
        assert counts[-1] == [216, 1024, 64]
    fixed = rule in ("SET", "RigL", "MEST", "SRigL", "Static", "SNFS(redistribution=False)")
    if distribution == "global" and fixed:
        assert counts == [counts[0]] * 10  # it shaped the first mask alone
    if distribution == "global" and rule in ("ACDC", "STE", "TopKAST"):
        assert len({tuple(c) for c in counts if sum(c) < total}) > 1
