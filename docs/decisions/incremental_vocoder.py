"""Draws `incremental-vocoder.png`. Needs matplotlib: `python -m docs.decisions.incremental_vocoder`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from bench.upstream_vocoder import Upstream
from bench.vocoder import CHUNK, WHOLE, weights
from service.engines.chattts.vocode import Vocoder, VocoderWork

RATE = 24_000


@torch.inference_mode()
def main() -> None:
    """The command."""
    torch.manual_seed(0)
    decoder, vocos = weights("full")
    upstream, vocoder = Upstream(decoder, vocos), Vocoder(decoder, vocos)
    hidden = _wandering(WHOLE, 2 * decoder["decoder.conv_in.0.weight"].shape[1])
    reference = upstream(hidden)
    ways = {
        "upstream, whole utterance": reference,
        "ours, whole utterance": vocoder.run([VocoderWork(vocoder.begin(), hidden, last=True)]).samples,
        f"ours, stream of {CHUNK} steps": _stream(vocoder, hidden),
        f"upstream's modules, prefix decoded anew every {CHUNK} steps": _prefixes(upstream, hidden),
    }
    figure, axes = plt.subplots(len(ways) + 1, figsize=(10, 12), sharex=True, layout="constrained")
    for axis, (name, wave) in zip(axes, ways.items(), strict=False):
        axis.specgram(wave.numpy() + 1e-9, NFFT=1024, noverlap=768, Fs=RATE, vmin=-130, vmax=-40)
        axis.set(title=name, ylabel="Hz")
        if wave is not reference:
            axes[-1].plot(*_error(wave, reference), label=name)
    axes[-1].set(title="error against the whole utterance by upstream", xlabel="seconds", ylabel="dB", ylim=(-170, 100))
    axes[-1].legend(loc="upper right")
    figure.savefig(Path(__file__).with_name("incremental-vocoder.png"), dpi=50)


def _wandering(steps: int, hidden: int) -> Tensor:
    """Hidden states that change slowly, so that there is something to see, [steps, hidden]."""
    knots = torch.randn(1, hidden, steps // 8 + 1)
    return torch.nn.functional.interpolate(knots, steps, mode="linear", align_corners=True)[0].t().contiguous()


def _stream(vocoder: Vocoder, hidden: Tensor) -> Tensor:
    state, parts = vocoder.begin(), hidden.split(CHUNK)
    return torch.cat([vocoder.run([VocoderWork(state, part, last=part is parts[-1])]).samples for part in parts])


def _prefixes(upstream: Upstream, hidden: Tensor) -> Tensor:
    """What the last samples of each longer prefix sound like: a stream without look-ahead."""
    waves = [torch.empty(0), *(upstream(hidden[:stop]) for stop in (*range(CHUNK, len(hidden), CHUNK), len(hidden)))]
    return torch.cat([wave[len(before) :] for before, wave in pairwise(waves)])


def _error(wave: Tensor, reference: Tensor, block: int = 256) -> tuple[Tensor, Tensor]:
    """Seconds, and dB of the error in each block against the mean power."""
    power = (wave - reference).square().view(-1, block).mean(dim=1) / reference.square().mean()
    return torch.arange(len(power)) * block / RATE, 10 * torch.log10(power + 1e-16)


if __name__ == "__main__":
    main()
