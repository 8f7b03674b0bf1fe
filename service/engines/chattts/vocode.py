"""Hidden states → 24 kHz samples, as they come: each frame is computed once, all rows in one pass.

A whole utterance and a stream take the same path: an utterance is a stream of one piece. What a row gets does not
depend on how its steps are cut into passes, nor on the rows beside it, up to rounding. With the full look-ahead it is
what upstream's Decoder and Vocos give for the whole utterance; see `docs/decisions/incremental-vocoder.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engines.chattts.convolution import Pass
from service.engines.chattts.network import Network, Tensors
from service.engines.chattts.packing import FRAMES_PER_STEP, Progress, pack

FULL_SCALE = 32_767


@dataclass(slots=True, eq=False)
class VocoderState:
    """A row on its way through the vocoder: about 0.4 MB on the device at full size, none once it has ended."""

    histories: Tensor | None
    """What every layer keeps of its input; None after the row's end."""
    steps: int = 0
    """Steps taken in."""

    @property
    def ended(self) -> bool:
        """It takes no more steps."""
        return self.histories is None


@dataclass(frozen=True, slots=True)
class VocoderWork:
    """What a row brings to a pass."""

    state: VocoderState
    hidden: Tensor
    """[steps, hidden] that follow those of its last pass. May be none."""
    last: bool = False
    """These are the row's last steps."""


@dataclass(frozen=True, slots=True)
class Waveforms:
    """What a pass made, all rows in one piece, so that one copy takes it off the device."""

    samples: Tensor
    """[samples] of all rows, one row behind the other."""
    int16: Tensor
    """The same as 16-bit numbers."""
    lengths: list[int]
    """Samples of each row, in the order of the work."""

    def rows(self) -> list[Tensor]:
        """Each row's samples, as views."""
        return list(self.samples.split(self.lengths))


def to_int16(samples: Tensor) -> Tensor:
    """Samples as 16-bit numbers: times 32,767, rounded to the nearest, clipped.

    Upstream's examples scale each finished wave by its own peak and cut digits off. A stream does not know its peak,
    and speech that is cut into segments must not change its loudness from one to the next.
    """
    return (samples * FULL_SCALE).round_().clamp_(-FULL_SCALE - 1, FULL_SCALE).to(torch.int16)


class Vocoder:
    """The incremental vocoder.

    After n steps a row that has not ended has been given 512 · (n - look-ahead) samples (none below 0), and one that
    has ended with N steps 512 · N - 256. So up to step k it wants k + look-ahead steps, or all and `last`.

    The network hears 52 steps ahead: `full_lookahead_steps`. With a shorter look-ahead, the samples of a pass are those
    of an utterance that ends with the pass's last step. They depend on where passes end then, and the missing future is
    computed anew in the next pass, which costs time.

    It works on one CUDA stream: the one current in its calls. Nothing in it waits for the device.

    Args:
        decoder: tensors of `Decoder.safetensors`. Their type and device are the vocoder's; the type should be fp32.
        vocos: tensors of `Vocos.safetensors`, of the same type and on the same device.
        lookahead_steps: at least 1. None: the full look-ahead.

    Raises:
        ValueError: the look-ahead is out of bounds.
        KeyError: a tensor is missing.
    """

    @torch.inference_mode()
    def __init__(self, decoder: Tensors, vocos: Tensors, lookahead_steps: int | None = None) -> None:
        self._network = Network(decoder, vocos)
        self._like = decoder["coef"]
        ahead = sum(reach.after for reach in self._network.reaches)
        self.full_lookahead_steps = -(-ahead // FRAMES_PER_STEP)
        self.lookahead_steps = self.full_lookahead_steps if lookahead_steps is None else lookahead_steps
        if not 1 <= self.lookahead_steps <= self.full_lookahead_steps:
            raise ValueError(f"the look-ahead must be 1 to {self.full_lookahead_steps} steps, not {lookahead_steps}")

    @property
    def samples_per_step(self) -> int:
        """512 in ChatTTS."""
        return self._network.samples_per_step

    @torch.inference_mode()
    def begin(self) -> VocoderState:
        """A new row's state."""
        return VocoderState(self._like.new_zeros(self._network.history_size))

    @torch.inference_mode()
    def run(self, work: Sequence[VocoderWork]) -> Waveforms:
        """Takes in what each row brings, in one pass through the network.

        Raises:
            ValueError: a row has ended before, or comes twice. No state has changed.
            torch.OutOfMemoryError: no state has changed.
        """
        histories = _histories(work)
        if not histories:
            return Waveforms(self._like.new_zeros(0), self._like.new_zeros(0, dtype=torch.int16), [])
        rows = [Progress(each.state.steps, each.state.steps + len(each.hidden), each.last) for each in work]
        packing = pack(self._network.reaches, rows, self.lookahead_steps, self._like.device)
        flow = Pass(packing, torch.stack(histories))
        hidden = torch.cat([each.hidden for each in work]).to(self._like)
        blocks = self._network(hidden, flow, packing.edges)
        samples = blocks.flatten()
        waveforms = Waveforms(samples, to_int16(samples), [blocks.shape[1] * count for count in packing.outputs])
        kept = list(flow.histories().unbind())
        # Nothing below needs memory.
        torch._foreach_copy_(histories, kept)
        for each, row in zip(work, rows, strict=True):
            each.state.steps = row.end
            if row.ended:
                each.state.histories = None
        return waveforms


def _histories(work: Sequence[VocoderWork]) -> list[Tensor]:
    histories = [each.state.histories for each in work if each.state.histories is not None]
    if len({id(each.state) for each in work}) != len(work) or len(histories) != len(work):
        raise ValueError("a row has ended before, or comes twice")
    return histories
