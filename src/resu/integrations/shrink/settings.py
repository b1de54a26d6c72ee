"""What ``resu shrink`` is told: how much goes, by which score, and what it is measured on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction

from resu.integrations.hf_text import kind_of
from resu.integrations.shrink.plan import Fractions
from resu.integrations.shrink.scores import unit_scores
from resu.integrations.shrink.targets import Target
from resu.integrations.shrink.transform import check_update

__all__ = ["ShrinkConfig"]


@dataclass(frozen=True)
class ShrinkConfig:
    """How a model is made smaller.

    Attributes:
        heads: Fraction of the heads removed from each block, in [0, 1); None: none, or what ``target`` needs.
        ffn: Fraction of the feed-forward width, likewise.
        depth: How many whole blocks are removed.
        target: What the result may cost; met by one fraction of whatever of ``heads`` and ``ffn`` is None.
        method: A name in :data:`resu.integrations.shrink.scores.unit_scores`; None: ``"taylor"`` with data, else
            ``"l2"``.
        data: Text to calibrate on (:func:`resu.integrations.hf_text.read_texts`).
        samples: Calibration samples.
        length: Tokens per sample; None: what the model was made for, at most 2048.
        evaluate: Text to measure quality on before and after; None: ``data``.
        update: None; ``"least-squares"``: the layers that read what is left are fitted on ``data``; or
            ``"sequential"``: after that all that write to the residual stream, one after another.
        round_to: The feed-forward width that stays is a multiple of it: odd widths can be slower than larger ones.
        batch: Rows of the inputs that multiply-adds and latency are measured on.
        tokens: Tokens of each row; None: 128, or what the model was made for.
        seed: Of samples and random numbers.

    Raises:
        ValueError: On impossible settings, or if nothing would be removed.
    """

    heads: float | Fraction | None = None
    ffn: float | Fraction | None = None
    depth: int = 0
    target: Target | None = None
    method: str | None = None
    data: str | os.PathLike[str] | None = None
    samples: int = 128
    length: int | None = None
    evaluate: str | os.PathLike[str] | None = None
    update: str | None = None
    round_to: int = 8
    batch: int = 1
    tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        Fractions(self.heads or 0.0, self.ffn or 0.0, self.depth, self.round_to)
        needs = unit_scores[self.score].needs_data
        if self.data is None and (needs or self.depth):
            what = f"{self.score!r} looks" if needs else "depth is decided by looking"
            raise ValueError(f"{what} at data: give a calibration text, a .txt or .jsonl file")
        check_update(self.update, self.data)
        if self.data is not None and kind_of(self.data) in (".csv", ".tsv"):
            raise ValueError(f"{self.data} is a table; give the calibration text as .txt or .jsonl (tables: evaluate)")
        if self.target is not None and not self.free:
            raise ValueError("heads and ffn are both given, so nothing is left to meet the target with; leave one out")

    @property
    def score(self) -> str:
        """The name of the score."""
        return self.method or ("l2" if self.data is None else "taylor")

    @property
    def free(self) -> list[str]:
        """Kinds of units whose fraction a target may choose."""
        return [kind for kind, given in (("heads", self.heads), ("ffn", self.ffn)) if given is None]

    @property
    def fractions(self) -> Fractions:
        """What is given, nothing for what is not."""
        return Fractions(self.heads or 0.0, self.ffn or 0.0, self.depth, self.round_to)
