"""What the device knows of the row at each place of the batch: how it draws, where it stands, what it drew last.

All of a row lies in one piece, so that one upload lets rows join, one copy moves a row, and one keeps what was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.engines.chattts.sample import NO_TOKEN, WINDOW, Sampling

_INTEGERS = ("seed", "segment", "attempt", "min_steps", "top_k", "step", "position")
_FLOATS = ("temperature", "tail", "penalty")
_WORD = 4
"""Bytes of the storage's elements. The last tokens begin after an even number of them."""


class Places:
    """Rows' states, as views of their storage.

    Args:
        storage: [rows, words], int32, as `laid_out` makes it; rows may be strided.
        codebooks: C.
    """

    def __init__(self, storage: Tensor, codebooks: int) -> None:
        self.storage = storage
        self._codebooks = codebooks
        columns: dict[str, Tensor] = {}
        start = 0
        for name in _INTEGERS:
            columns[name] = storage[:, start : start + 2].view(torch.int64).squeeze(1)
            start += 2
        for name in _FLOATS:
            columns[name] = storage[:, start : start + 1].view(torch.float32).squeeze(1)
            start += 1
        self.step = columns.pop("step")
        """[rows]: the step to draw for."""
        self.position = columns.pop("position")
        """[rows]: where the next token comes to stand in the cache."""
        self.sampling = Sampling(**columns)
        recent = storage[:, start + 1 :].view(torch.int64)
        self.recent = recent.unflatten(1, (codebooks, WINDOW))
        """[rows, C, W]: the last tokens, the latest last."""

    def first(self, rows: int) -> Places:
        """The first of them: the same memory."""
        return Places(self.storage[:rows], self._codebooks)

    def at(self, places: Tensor) -> Places:
        """Some of them: a copy."""
        return Places(self.storage[places], self._codebooks)


def laid_out(rows: Sequence[dict[str, float]], codebooks: int) -> NDArray[np.int32]:
    """Rows that have drawn nothing yet, [rows, words], to be uploaded.

    Args:
        rows: values by their names; what is left out is 0.
        codebooks: C.
    """
    fields: list[Any] = [(name, "<i8") for name in _INTEGERS] + [(name, "<f4") for name in _FLOATS]
    layout = np.dtype([*fields, ("padding", "<i4"), ("recent", "<i8", (codebooks, WINDOW))])
    states = np.zeros(len(rows), layout)
    states["recent"] = NO_TOKEN
    for state, values in zip(states, rows, strict=True):
        for name, value in values.items():
            state[name] = value
    return states.view("<i4").reshape(len(rows), layout.itemsize // _WORD)


IDLE: dict[str, float] = {"temperature": 1.0, "top_k": 1, "penalty": 1.0}
"""A place that no row has: what is drawn there is dropped."""
