"""What hidden states → samples costs on this CPU: the incremental vocoder beside upstream's modules, fp32, full size.

    python -m bench.vocoder [--quick] [--json] [--threads 1]

Weights are random. A stream gets its samples in chunks of 24 steps (0.512 s). Upstream's modules make them from a
window of 128 steps, 52 on each side of the chunk, which is the least that gives the same samples; or, for a whole
utterance of 200 steps, at once. All take turns, and each figure is the minimum over the rounds: other work on the
machine only adds.

Milliseconds are CPU time of all threads for a second of audio of one row, of so many rows at once. `ratio_to_windows`
and `ratio_to_full`: upstream's milliseconds over ours in streaming; above 1 ours is faster. `limit`: the blocks' matrix
products alone, for as many frames as ours computes. `whole`: ours, an utterance of 200 steps in one pass. `short`: ours
with a look-ahead of 8 steps. `stream_error_db`: a stream of chunks against upstream's whole utterance.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from bench.report import metadata
from bench.upstream_vocoder import Tensors, Upstream, checkpoint, decibels
from service.engines.chattts.checkpoint import SIZES
from service.engines.chattts.packing import FRAMES_PER_STEP
from service.engines.chattts.vocode import Vocoder, VocoderWork

STEPS_PER_SECOND = 46.875
CHUNK, WINDOW, WHOLE = 24, 128, 200
SHORT_LOOKAHEAD = 8
BATCHES = (1, 8)

Figures = dict[str, float]
Way = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Size:
    """How much to measure."""

    rounds: int
    weights: str


TINY = Size(rounds=1, weights="tiny")
QUICK = Size(rounds=5, weights="full")
FULL = Size(rounds=20, weights="full")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one to two minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = TINY if args.tiny else QUICK if args.quick else FULL
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    decoder, vocos = weights(size.weights)
    upstream = Upstream(decoder, vocos)
    report = _metadata(size) | {
        "stream_error_db": round(_stream_error(decoder, vocos, upstream), 1),
        "batches": {str(rows): measure(decoder, vocos, upstream, rows, size.rounds) for rows in BATCHES},
    }
    print(json.dumps(report) if args.json else _table(report))


@torch.inference_mode()
def measure(decoder: Tensors, vocos: Tensors, upstream: Upstream, rows: int, rounds: int) -> Figures:
    """The figures of so many rows at once."""
    window, whole = _hidden(decoder, WINDOW, rows), _hidden(decoder, WHOLE, rows)
    vocoder = Vocoder(decoder, vocos)
    ways: dict[str, tuple[Way, int]] = {
        "stream": (_stream(vocoder, decoder, rows), CHUNK),
        "upstream_windows": (lambda: upstream.batch(window), CHUNK),
        "upstream_full": (lambda: upstream.batch(whole), WHOLE),
        "whole": (lambda: vocoder.run([VocoderWork(vocoder.begin(), each, last=True) for each in whole]), WHOLE),
        "short": (_stream(Vocoder(decoder, vocos, SHORT_LOOKAHEAD), decoder, rows), CHUNK),
        "limit": (_products(decoder, vocos, FRAMES_PER_STEP * CHUNK * rows), CHUNK),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds + 1):
        for name, (way, _steps) in ways.items():
            best[name] = min(best[name], _seconds(way))
    figures = {
        f"{name}_cpu_ms_per_audio_s": round(best[name] * 1e3 * STEPS_PER_SECOND / steps / rows, 2)
        for name, (_way, steps) in ways.items()
    }
    ours = figures["stream_cpu_ms_per_audio_s"]
    figures["ratio_to_windows"] = round(figures["upstream_windows_cpu_ms_per_audio_s"] / ours, 3)
    figures["ratio_to_full"] = round(figures["upstream_full_cpu_ms_per_audio_s"] / ours, 3)
    return figures


def weights(size: str) -> tuple[Tensors, Tensors]:
    """Of the vocoder; the rest of the checkpoint is tiny in any case."""
    tiny, wanted = SIZES["tiny"], SIZES[size]
    with TemporaryDirectory() as folder:
        return checkpoint(Path(folder), replace(tiny, decoder=wanted.decoder, vocos=wanted.vocos))


def _hidden(decoder: Tensors, steps: int, rows: int) -> Tensor:
    """[rows, steps, hidden], at random."""
    return torch.randn(rows, steps, FRAMES_PER_STEP * decoder["decoder.conv_in.0.weight"].shape[1])


def _stream(vocoder: Vocoder, decoder: Tensors, rows: int) -> Way:
    """A chunk of streams that are long under way."""
    hidden = _hidden(decoder, CHUNK, rows)
    states = [vocoder.begin() for _ in range(rows)]
    work = [VocoderWork(state, each) for state, each in zip(states, hidden, strict=True)]
    while states[0].steps <= vocoder.full_lookahead_steps:
        vocoder.run(work)
    return lambda: vocoder.run(work)


def _products(decoder: Tensors, vocos: Tensors, frames: int) -> Way:
    weights = [
        each for part in (decoder, vocos) for name, each in part.items() if ".pwconv" in name and each.dim() == 2
    ]
    inputs = {width: torch.randn(frames, width) for width in {each.shape[1] for each in weights}}

    def multiply() -> None:
        for each in weights:
            F.linear(inputs[each.shape[1]], each)

    return multiply


def _seconds(way: Way) -> float:
    """Of CPU."""
    began = time.process_time()
    way()
    return time.process_time() - began


def _stream_error(decoder: Tensors, vocos: Tensors, upstream: Upstream) -> float:
    vocoder = Vocoder(decoder, vocos)
    (hidden,) = _hidden(decoder, WHOLE, rows=1)
    state, parts = vocoder.begin(), hidden.split(CHUNK)
    pieces = [vocoder.run([VocoderWork(state, part, last=part is parts[-1])]).samples for part in parts]
    return decibels(torch.cat(pieces), upstream(hidden))


def _metadata(size: Size) -> dict[str, str | float]:
    return metadata() | {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "weights": size.weights,
        "rounds": size.rounds,
    }


def _table(report: Mapping[str, object]) -> str:
    batches = report["batches"]
    assert isinstance(batches, dict)
    lines = [f"{key:<16} {value}" for key, value in report.items() if key != "batches"]
    lines.append("\n" + f"{'rows at once':<38}" + "".join(f"{rows:>10}" for rows in batches))
    fields = list(next(iter(batches.values())))
    lines += [f"{field:<38}" + "".join(f"{each[field]:>10,.2f}" for each in batches.values()) for field in fields]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
