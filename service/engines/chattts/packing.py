"""Rows of different progress as one sequence: which frames each layer computes in a pass, and where they lie.

A convolution needs context on both sides of a frame. To compute each frame once, every layer keeps the last frames of
its input (its *history*), and its output ends as many frames before its input as it sees to the right, until the row
has ended and zeros stand for the future. A row's place in each layer follows from its steps alone, so all rows of a
pass, whether they just begin, go on or end, are laid one behind the other:

    row 0: history, new frames, zeros behind the end | row 1: … | …

A layer runs over the whole sequence at once. What it computes across two rows' border is not picked.

All sizes are known on the host. The indices themselves are made on the device, from one small upload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.engines.chattts.lanes import upload

FRAMES_PER_STEP = 2

_Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Reach:
    """How many frames a layer sees before and after the one that it computes."""

    before: int
    after: int

    @property
    def span(self) -> int:
        """Frames of its input that it keeps from one pass to the next."""
        return self.before + self.after


@dataclass(frozen=True, slots=True)
class Progress:
    """A row's steps at the beginning and at the end of a pass, and whether it has no more."""

    begin: int
    end: int
    ended: bool


@dataclass(frozen=True, slots=True)
class LayerPacking:
    """Indices of one layer, on the device."""

    reach: Reach
    gather: Tensor
    """[sequence] into histories, new frames and `reach.after` zeros, one behind the other."""
    pick: Tensor
    """[outputs] into what the layer computed: the frames that are new and right."""
    keep: Tensor
    """[rows · span] into the sequence: the histories for the next pass."""


@dataclass(frozen=True, slots=True)
class Packing:
    """A pass, laid out."""

    layers: list[LayerPacking]
    outputs: list[int]
    """Blocks of samples that each row gets."""
    edges: Tensor
    """[blocks] 0, plus 1 for a row's first block, plus 2 for its last."""


def pack(reaches: Sequence[Reach], rows: Sequence[Progress], lookahead_steps: int, device: torch.device) -> Packing:
    """Lays out a pass.

    Args:
        reaches: of each layer, from the first to the inverse STFT.
        rows: at least one.
        lookahead_steps: a row that has not ended gets samples up to so many steps before its end. Where the network
            looks further, it sees the row as if it ended there, and histories do not take part in that.
        device: of the indices.
    """
    frames = _Frames(reaches, rows, lookahead_steps)
    starts, counts = frames.runs()
    layers, parts = len(reaches), (3 * len(rows), 4 * len(rows))
    sizes = np.stack([part.sum(axis=1) for part in np.split(counts, parts, axis=1)], axis=1).ravel().tolist()
    numbers = upload(np.concatenate((starts.ravel(), counts.ravel(), frames.edges())), device)
    indices = _expand(numbers[: starts.size], numbers[starts.size : 2 * starts.size], sum(sizes)).split(sizes)
    return Packing(
        layers=[LayerPacking(reaches[layer], *indices[3 * layer : 3 * layer + 3]) for layer in range(layers)],
        outputs=frames.outputs[-1].tolist(),
        edges=numbers[2 * starts.size :],
    )


class _Frames:
    """Which frames of its input each layer gets in a pass. Arrays are [layers, rows]; one row more is the output."""

    def __init__(self, reaches: Sequence[Reach], rows: Sequence[Progress], lookahead_steps: int) -> None:
        self._after = np.array([[reach.after] for reach in reaches])
        self._span = np.array([[reach.span] for reach in reaches])
        self._ended = np.array([row.ended for row in rows])
        begin, end = (FRAMES_PER_STEP * np.array(each) for each in ([r.begin for r in rows], [r.end for r in rows]))
        lag = np.concatenate((np.zeros((1, 1), np.int64), self._after.cumsum(axis=0)))
        lookahead = FRAMES_PER_STEP * lookahead_steps
        self._kept = np.maximum(0, end - lag[:-1])
        self._starts = np.maximum(0, begin - lag)
        self._starts[-1] = np.maximum(0, begin - lookahead)
        self._stops = np.where(self._ended, end, np.clip(end - lookahead + lag[-1] - lag, 0, end))
        self._stops[-1] -= self._ended & (end > 0)  # the end is the last frame's centre, half a block and a half short
        self.outputs = self._stops[1:] - self._starts[1:]

    def runs(self) -> tuple[_Integers, _Integers]:
        """Starts and lengths of what each layer gathers (three runs a row), picks (one) and keeps (one)."""
        rows = np.arange(len(self._ended))
        first, stops = self._starts[:-1], self._stops[:-1]
        new = stops - first
        zeros = np.where(self.outputs > 0, np.maximum(0, self._stops[1:] + self._after - stops), 0)
        span = np.broadcast_to(self._span, new.shape)
        length = span + new + zeros
        place = length.cumsum(axis=1) - length
        histories = span * len(rows)
        gather = np.stack((span * rows, histories + new.cumsum(axis=1) - new, histories + new.sum(1, keepdims=True)), 2)
        pick = place + self._starts[1:] - first + self._after
        keep = place + self._kept - first
        gathered = np.stack((span, new, zeros), axis=2)
        return (
            np.concatenate((gather.reshape(len(gather), -1), pick, keep), axis=1),
            np.concatenate((gathered.reshape(len(gather), -1), self.outputs, span), axis=1),
        )

    def edges(self) -> _Integers:
        """See `Packing.edges`."""
        counts = self.outputs[-1]
        stops, some = counts.cumsum(), counts > 0
        edges = np.zeros(int(counts.sum()), np.int64)
        edges[(stops - counts)[some & (self._starts[-1] == 0)]] += 1
        edges[stops[some & self._ended] - 1] += 2
        return edges


def _expand(starts: Tensor, counts: Tensor, total: int) -> Tensor:
    """The numbers of all runs, [total]. With the total known, nothing is read back from the device."""
    behind = counts.cumsum(0) - counts
    shifts = torch.repeat_interleave(starts - behind, counts, output_size=total)
    return shifts + torch.arange(total, device=starts.device)
