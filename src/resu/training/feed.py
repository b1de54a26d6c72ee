"""An endless, resumable stream of batches from a user's loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

__all__ = ["Feed"]


class Feed:
    """Batches of ``loader``, epoch after epoch; its position can be saved and found again.

    At the start of an epoch the random state that a shuffling loader draws from is noted (torch's global
    CPU generator and the loader's own ``generator``). To resume, that state is put back, the epoch's first batches are
    drawn again and dropped, and the state of the saved moment returns: the same batches follow, for a
    ``DataLoader`` that shuffles, as for a list. Python's and NumPy's generators are not kept.

    Raises:
        ValueError: If the loader is empty or can be iterated only once.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        if isinstance(loader, Iterator):
            raise ValueError(
                "the train loader is an iterator, which can be read only once; pass a DataLoader, a list or "
                "another object that starts anew at each iter()"
            )
        self.loader = loader
        self.last: Any = None
        self._done = 0
        self._iterator: Iterator[Any] | None = None
        self._start: dict[str, torch.Tensor] = {}

    def _own_generator(self) -> torch.Generator | None:
        for holder in (self.loader, getattr(self.loader, "sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                return generator
        return None

    def _random_state(self) -> dict[str, torch.Tensor]:
        own = self._own_generator()
        state = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            state |= {f"cuda:{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())}
        return state if own is None else {**state, "loader": own.get_state()}

    def _set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(state["torch"])
        for key, value in state.items():
            if key.startswith("cuda:"):
                torch.cuda.set_rng_state(value, key)
        own = self._own_generator()
        if own is not None and "loader" in state:
            own.set_state(state["loader"])

    def __next__(self) -> Any:
        if self._iterator is None:
            self._start = self._random_state()
            self._iterator, self._done = iter(self.loader), 0
        try:
            self.last = next(self._iterator)
        except StopIteration:
            if self._done == 0:
                raise ValueError("the train loader is empty: it gave no batch") from None
            self._iterator = None
            return next(self)
        self._done += 1
        return self.last

    def state_dict(self) -> dict[str, Any]:
        """Position in the epoch and the random states of its start and of now."""
        inside = self._iterator is not None
        return {
            "done": self._done if inside else 0,
            "start": dict(self._start) if inside else {},
            "now": self._random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Find the saved position again."""
        self._iterator, self._done = None, 0
        if state["done"]:
            self._set_random_state(state["start"])
            for _ in range(state["done"]):
                next(self)
        self._set_random_state(state["now"])
