"""ChatTTS's Decoder and Vocos as layers over packed rows: hidden states → windowed frames of sound → blocks of samples.

Written after `ChatTTS/model/dvae.py` (0.2.5) and `models.py`, `modules.py`, `heads.py` and `spectral_ops.py` of vocos
0.1.0, whose tensors it takes by their names. The Decoder's last two convolutions and `coef` are folded into one, since
nothing stands between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from service.engines.chattts.convolution import Depthwise, Pass, overlap_add, windows
from service.engines.chattts.packing import FRAMES_PER_STEP, Reach

HOPS = 4
"""Hops in a frame of the inverse STFT."""
DECODER_DILATION = 2
NORM_EPS = 1e-6
MAGNITUDE_MAX = 100.0
FFT_BATCH = 64
"""Frames are transformed in multiples of so many, and never none: cuFFT plans anew for each number that it has not
seen, and MKL refuses none."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Norm:
    """Layer normalisation over channels."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, tensors: Tensors, name: str) -> Norm:
        """Takes its tensors."""
        return cls(tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def __call__(self, x: Tensor) -> Tensor:
        """[frames, channels] → the same."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, NORM_EPS)


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution over all channels: a linear layer over windows."""

    weight: Tensor
    """[outputs, kernel · inputs]"""
    bias: Tensor | None
    kernel: int

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Convolution:
        """From a weight [outputs, inputs, kernel]."""
        return cls(weight.transpose(1, 2).flatten(1).contiguous(), bias, weight.shape[2])

    @property
    def channels(self) -> int:
        """Of its input."""
        return self.weight.shape[1] // self.kernel

    @property
    def reach(self) -> Reach:
        """The window, its middle excepted."""
        return Reach(self.kernel // 2, self.kernel // 2)

    def __call__(self, x: Tensor, flow: Pass) -> Tensor:
        """[new frames, inputs] → [outputs' frames, outputs]."""
        return F.linear(flow.pick(windows(flow.enter(x), self.kernel)), self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Block:
    """A ConvNeXt block."""

    depthwise: Depthwise
    norm: Norm
    wide: Tensor
    wide_bias: Tensor
    narrow: Tensor
    narrow_bias: Tensor
    scale: Tensor
    """[channels] of what is added."""

    @classmethod
    def of(cls, tensors: Tensors, name: str, scale: str, dilation: int) -> Block:
        """Takes its tensors. `scale` is what the layer scale is called."""
        return cls(
            depthwise=Depthwise.of(tensors[f"{name}.dwconv.weight"], tensors[f"{name}.dwconv.bias"], dilation),
            norm=Norm.of(tensors, f"{name}.norm"),
            wide=tensors[f"{name}.pwconv1.weight"],
            wide_bias=tensors[f"{name}.pwconv1.bias"],
            narrow=tensors[f"{name}.pwconv2.weight"],
            narrow_bias=tensors[f"{name}.pwconv2.bias"],
            scale=tensors[f"{name}.{scale}"],
        )

    @property
    def channels(self) -> int:
        """Of its input."""
        return len(self.scale)

    @property
    def reach(self) -> Reach:
        """Of its convolution."""
        return self.depthwise.reach

    def __call__(self, x: Tensor, flow: Pass) -> Tensor:
        """[new frames, channels] → [outputs' frames, channels]."""
        packed = flow.enter(x)
        y = self.norm(flow.pick(self.depthwise(packed)))
        y = F.linear(F.gelu(F.linear(y, self.wide, self.wide_bias)), self.narrow, self.narrow_bias)
        return flow.pick_centre(packed).addcmul_(y, self.scale)


@dataclass(frozen=True, slots=True)
class InverseStft:
    """Vocos's head: spectra → samples, as `torch.istft` with `center=True`.

    A row of n frames has n - 1 blocks of samples, of one hop each, from the first frame's centre to the last's. A block
    hears the frame before it, its own and two behind; at a row's ends one of them is missing, and what the windows add
    up to differs.
    """

    weight: Tensor
    bias: Tensor
    window: Tensor
    scales: Tensor
    """[4, hop] One over the sum of squared windows: inside a row, in its first block, in its last, in its only one."""

    @property
    def channels(self) -> int:
        """Of the input of what has context: samples of a frame."""
        return len(self.window)

    @property
    def reach(self) -> Reach:
        """Of the blocks into the frames."""
        return Reach(before=1, after=2)

    @classmethod
    def of(cls, tensors: Tensors) -> InverseStft:
        """Takes its tensors."""
        window = tensors["head.istft.window"]
        squares = window.double().square().view(HOPS, -1)
        missing_first, missing_last = squares[-1], squares[0]
        missing = torch.stack((0 * missing_first, missing_first, missing_last, missing_first + missing_last))
        scales = (squares.sum(dim=0) - missing).reciprocal().to(window.dtype)
        return cls(tensors["head.out.weight"], tensors["head.out.bias"], window, scales)

    @property
    def hop(self) -> int:
        """Samples in a block."""
        return len(self.window) // HOPS

    def __call__(self, x: Tensor, flow: Pass, edges: Tensor) -> Tensor:
        """[new frames, channels] → [blocks, hop]. `edges` as in `Packing`."""
        blocks = flow.pick(overlap_add(flow.enter(self._frames(x)), HOPS))
        return blocks.mul_(self.scales.index_select(0, edges))

    def _frames(self, x: Tensor) -> Tensor:
        """[frames, channels] → windowed [frames, samples of a frame]."""
        magnitude, phase = F.linear(x, self.weight, self.bias).chunk(2, dim=1)
        magnitude = magnitude.exp().clamp_(max=MAGNITUDE_MAX)
        spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
        padded = F.pad(spectrum, (0, 0, 0, FFT_BATCH - len(x) % FFT_BATCH))
        frames: Tensor = torch.fft.irfft(padded, n=len(self.window))[: len(x)]
        return frames.mul_(self.window)


class Network:
    """Decoder and Vocos.

    Args:
        decoder: tensors of `Decoder.safetensors`.
        vocos: tensors of `Vocos.safetensors`, of the same type and on the same device.
    """

    def __init__(self, decoder: Tensors, vocos: Tensors) -> None:
        self._conv_in = Convolution.of(decoder["decoder.conv_in.0.weight"], decoder["decoder.conv_in.0.bias"])
        self._conv_up = Convolution.of(decoder["decoder.conv_in.2.weight"], decoder["decoder.conv_in.2.bias"])
        self._decoder = _blocks(decoder, "decoder.decoder_block", "weight", DECODER_DILATION)
        self._mel = Convolution.of(_mel_weight(decoder), None)
        self._embed = Convolution.of(vocos["backbone.embed.weight"], vocos["backbone.embed.bias"])
        self._embed_norm = Norm.of(vocos, "backbone.norm")
        self._vocos = _blocks(vocos, "backbone.convnext", "gamma", dilation=1)
        self._final_norm = Norm.of(vocos, "backbone.final_layer_norm")
        self._head = InverseStft.of(vocos)
        layers: list[Convolution | Block | InverseStft] = [self._conv_in, self._conv_up, *self._decoder, self._mel]
        layers += [self._embed, *self._vocos, self._head]
        self.reaches = [layer.reach for layer in layers]
        """Of the layers with context, in their order."""
        self.history_size = sum(layer.reach.span * layer.channels for layer in layers)
        """Numbers in a row's histories."""
        self.samples_per_step = FRAMES_PER_STEP * self._head.hop

    def __call__(self, hidden: Tensor, flow: Pass, edges: Tensor) -> Tensor:
        """Makes samples.

        Args:
            hidden: [steps, hidden] of all rows, one row behind the other. A step is two frames, halves of its channels.
            flow: of this pass.
            edges: as in `Packing`.

        Returns:
            [blocks, samples of a block] of all rows.
        """
        x = hidden.reshape(FRAMES_PER_STEP * len(hidden), self._conv_in.channels)
        x = self._conv_up(F.gelu(self._conv_in(x, flow)), flow)
        for block in self._decoder:
            x = block(x, flow)
        x = self._embed_norm(self._embed(self._mel(x, flow), flow))
        for block in self._vocos:
            x = block(x, flow)
        return self._head(self._final_norm(x), flow, edges)


def _blocks(tensors: Tensors, name: str, scale: str, dilation: int) -> list[Block]:
    count = sum(key.startswith(f"{name}.") and key.endswith(".dwconv.bias") for key in tensors)
    return [Block.of(tensors, f"{name}.{n}", scale, dilation) for n in range(count)]


def _mel_weight(decoder: Tensors) -> Tensor:
    """`conv_out` (of one tap), `out_conv` and `coef` in one, [mels, hidden, kernel]. None of them has a bias."""
    conv_out, out_conv, coef = (
        decoder[name].double() for name in ("decoder.conv_out.weight", "out_conv.weight", "coef")
    )
    weight = coef.view(-1, 1, 1) * torch.einsum("mok,oh->mhk", out_conv, conv_out.squeeze(2))
    return weight.to(decoder["coef"].dtype)
