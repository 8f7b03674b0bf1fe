"""Convolutions over packed rows, frames first: [frames, channels].

With channels last, the pointwise layers, which are nine tenths of the work, need no transposition, and a window of
frames lies in memory in one piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from service.engines.chattts.packing import LayerPacking, Packing, Reach


class Pass:
    """One pass of rows through the network: gives each layer its context, and collects the new histories.

    Layers call it in their order: `enter` and then, any number of times, `pick`.

    Args:
        packing: the layout.
        histories: [rows, all layers' history], as `histories` of the last pass gave it.
    """

    def __init__(self, packing: Packing, histories: Tensor) -> None:
        self._layers = iter(packing.layers)
        self._layer: LayerPacking
        self._histories = histories
        self._read = 0
        self._kept: list[Tensor] = []

    def enter(self, new: Tensor) -> Tensor:
        """Goes on to the next layer. New frames [new, channels] → the packed sequence [sequence, channels]."""
        layer = self._layer = next(self._layers)
        rows, channels, span = len(self._histories), new.shape[1], layer.reach.span
        history = self._histories[:, self._read : self._read + span * channels].reshape(rows * span, channels)
        self._read += span * channels
        zeros = new.new_zeros((layer.reach.after, channels))
        packed = torch.cat((history, new, zeros)).index_select(0, layer.gather)
        self._kept.append(packed.index_select(0, layer.keep).view(rows, span * channels))
        return packed

    def pick(self, computed: Tensor) -> Tensor:
        """From values at each place of the layer's window in the sequence, those of its output, [outputs, …]."""
        return computed.index_select(0, self._layer.pick)

    def pick_centre(self, packed: Tensor) -> Tensor:
        """From the sequence, the frames that the layer's windows stand on, [outputs, channels]."""
        return self.pick(packed[self._layer.reach.before :])

    def histories(self) -> Tensor:
        """[rows, all layers' history], for the next pass."""
        return torch.cat(self._kept, dim=1)


def windows(packed: Tensor, kernel: int) -> Tensor:
    """A view [places, kernel · channels]: the frames under the kernel at each place."""
    frames, channels = packed.shape
    return packed.as_strided((frames - kernel + 1, kernel * channels), (channels, 1))


@dataclass(frozen=True, slots=True)
class Depthwise:
    """A convolution of each channel by itself, without padding."""

    weight: Tensor
    """[channels, 1, kernel]"""
    taps: Tensor
    """[kernel, channels]: the same."""
    bias: Tensor
    dilation: int
    """Frames between taps."""

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, dilation: int) -> Depthwise:
        """From a weight [channels, 1, kernel]."""
        return cls(weight, weight.squeeze(1).t().contiguous(), bias, dilation)

    @property
    def reach(self) -> Reach:
        """The window, its middle excepted."""
        side = self.dilation * (len(self.taps) // 2)
        return Reach(side, side)

    def __call__(self, packed: Tensor) -> Tensor:
        """[frames, channels] → [frames - span, channels].

        On a CPU by shifts: at 24 steps 44 µs on one thread, where `conv1d` with its transpositions takes 190 and a
        channels-last `conv2d` 67. On a GPU each shift would be a launch. There `conv1d` is one, by torch's own kernel:
        cuDNN, which a channels-last input would choose, plans anew for each length.
        """
        return self.by_conv1d(packed) if packed.is_cuda else self.by_shifts(packed)

    def by_shifts(self, packed: Tensor) -> Tensor:
        """As a sum of shifted frames."""
        places = len(packed) - self.reach.span
        shifts = range(0, self.dilation * len(self.taps), self.dilation)
        total = self.bias
        for shift, tap in zip(shifts, self.taps.unbind(), strict=True):
            total = torch.addcmul(total, packed[shift : shift + places], tap)
        return total

    def by_conv1d(self, packed: Tensor) -> Tensor:
        """In one call of torch."""
        channels_first = packed.t().contiguous().unsqueeze(0)
        convolved = F.conv1d(channels_first, self.weight, self.bias, dilation=self.dilation, groups=len(self.bias))
        return convolved[0].t()


def overlap_add(packed: Tensor, hops: int) -> Tensor:
    """Adds up what overlapping frames say of each block of samples.

    Args:
        packed: [frames, hops · hop].
        hops: hops in a frame.

    Returns:
        [frames - hops + 1, hop]: the block that frame `hops - 1` begins, and so on.
    """
    places = len(packed) - hops + 1
    parts = packed.chunk(hops, dim=1)
    total = parts[0][hops - 1 :].clone()
    for behind, part in enumerate(parts[1:], start=1):
        total += part[hops - 1 - behind :][:places]
    return total
