"""What ChatTTS does on a GPU, stage by stage, each a process of its own: `bench/gpu.sh` runs them all.

    python -m bench.gpu STAGE --folder RESULTS [--checkpoint FOLDER] [--device cuda] [--dry]

Weights are random and of full size. Each stage leaves `RESULTS/STAGE.json`, with what it has found so far, and
`bench.gpu_report` puts them together. Times are wall time; a card of one's own is quiet.

- machine: the card, the rate at which it copies its memory, and what a plan costs on its way to an engine's process.
- correct: greedy tokens in fp32 beside unmodified upstream's, which may differ only at a gap of at most 1e-4
  (`tie_rate`); replayed passes beside called ones, bit for bit; what in a plan waits for the device although it should
  not (`waits_between_plans`: nothing); the vocoder beside itself on the CPU (`vocoder_error`,
  relative); bf16 tokens alone and in a batch (`match_rate_fast_mode`).
- steps: milliseconds a step at 250 tokens of cache, by rows: as it is served, without kernels, and without either; the
  limit is the time to read the weights and the live cache at the card's rate.
- burst: speeches of 1 to 12 s in 4 voices, all at once, through the scheduler; three times, so that memory shows
  whether it grows.
- streams: streams that come within a second. First audio, and the worst underrun of a listener.
- night: the texts of 800 requests a second that are no repeats, with lengths around 6 s, at random moments; the last
  byte.
- upstream, upstream_compiled: the burst through unmodified upstream, in batches of one voice.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from batcher.engine import Prediction, Segment
from batcher.policy import Policy
from bench.burst import VOICES, Upstream, batches, burst
from bench.canned import tick_ms
from bench.engine import match_rate, tie_rate
from bench.report import metadata, quantile
from bench.virtual import CHARACTERS_PER_SECOND, STEPS_PER_SECOND, Caller, Replay, Speech, lengths
from common.settings import ChatTTSSettings
from service.engines.chattts.checkpoint import SIZES, make_checkpoint
from service.engines.chattts.decode import Decoder, Drawing, Row
from service.engines.chattts.engine import ChatTTSEngine
from service.engines.chattts.graphs import CudaRecorder
from service.engines.chattts.load import Weights, load_weights
from service.engines.chattts.prompt import Prompt
from service.engines.chattts.upstream import load_upstream
from service.engines.chattts.vocode import Vocoder, VocoderWork

Figures = dict[str, Any]

KV_TOKENS = 250
LENGTH = 1024
REFINE_END = 21137
"""The token `[Ebreak]`; no row of this benchmark draws text."""
COPIED_BYTES = 1 << 30
REQUESTS_PER_SECOND, REPEATS = 800.0, 0.6
MEAN_SECONDS, LONGEST_SECONDS = 6.0, 12.0


@dataclass(frozen=True, slots=True)
class Size:
    """How much to measure."""

    weights: str
    rows: Sequence[int]
    steps: int
    speeches: int
    scale: float
    streams: Sequence[int]
    night_seconds: float
    night_rate: float
    compared: int
    upstream_batch: int


REAL = Size("full", (1, 8, 32, 64, 128, 256), 64, 512, 1.0, (1, 16, 64, 128), 15.0, REQUESTS_PER_SECOND, 200, 64)
DRY = Size("tiny", (1, 8), 2, 8, 0.05, (1, 2), 1.0, 5.0, 8, 2)
"""As far as a CPU can."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and with what a stage runs."""

    device: Literal["cuda", "cpu"]
    checkpoint: Path
    size: Size

    @property
    def dtype(self) -> Literal["bf16", "fp32"]:
        """What is served."""
        return "bf16" if self.device == "cuda" else "fp32"

    def weights(self, dtype: Literal["bf16", "fp32"]) -> Weights:
        """The model."""
        return load_weights(self.checkpoint, self.device, dtype, check_sums=False)

    def decoder(self, weights: Weights, slots: int, *, kernels: bool = True, graphs: bool = True) -> Decoder:
        """As it is served, or with less. On a CPU there is neither."""
        gpu = self.device == "cuda"
        recorder = CudaRecorder(weights.device) if gpu and graphs else None
        return Decoder(weights, slots, LENGTH, REFINE_END, kernels=gpu and kernels, recorder=recorder)

    def wait(self) -> None:
        """For the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()


# -- stages -----------------------------------------------------------------------------------------------------------


def machine(setting: Setting, figures: Figures) -> None:
    """See the module."""
    make_checkpoint(setting.checkpoint, SIZES[setting.size.weights])
    source = torch.empty(COPIED_BYTES if setting.device == "cuda" else 1 << 24, dtype=torch.uint8)
    source = source.to(setting.device)
    target = torch.empty_like(source)
    seconds = best_of(5, setting, lambda: target.copy_(source))
    figures.update(metadata())
    figures.update(process_tick_ms=tick_ms())
    figures.update(torch=torch.__version__, copied_bytes_per_s=round(2 * source.numel() / seconds))
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        figures.update(card=properties.name, memory_bytes=properties.total_memory, cuda=torch.version.cuda)


def correct(setting: Setting, figures: Figures) -> None:
    """See the module."""
    weights, count = setting.weights("fp32"), setting.size.compared
    figures["vocoder_error"] = _vocoder_error(setting, weights)
    served = setting.decoder(weights, 8)
    # Eight rows and prompts of 32 tokens are what is recorded: nothing is padded, so that all is of equal shapes.
    ours, theirs = (_spoken(each, 8, count) for each in (served, setting.decoder(weights, 8, graphs=False)))
    figures["replayed_as_called"] = all(
        torch.equal(row.hidden(0, row.done), other.hidden(0, row.done)) for row, other in zip(ours, theirs, strict=True)
    )
    plain = _spoken(setting.decoder(weights, 8, kernels=False, graphs=False), 8, count)
    figures["match_rate_without_kernels"] = _match(ours, plain)
    figures["waits_between_plans"] = _waits(setting)
    figures["match_rate_fast_mode"] = match_rate(setting.decoder(setting.weights(setting.dtype), 8), count)
    figures["tie_rate"] = tie_rate(load_upstream(setting.checkpoint, setting.device), weights, served, count)


def steps(setting: Setting, figures: Figures) -> None:
    """See the module."""
    weights, sizes, rate = setting.weights(setting.dtype), setting.size.rows, machine_rate(setting)
    figures["limit_ms_per_step"] = {str(rows): round(1e3 * _bytes(weights, rows) / rate, 4) for rows in sizes}
    ways = {"served": {}, "without_kernels": {"kernels": False}, "called": {"kernels": False, "graphs": False}}
    for name, without in ways.items():
        decoder = setting.decoder(weights, max(sizes), **without)
        found = {str(rows): _step_ms(setting, decoder, rows) for rows in sizes}
        figures[f"ms_per_step_{name}"] = found
        if name == "served":
            figures["audio_s_per_s"] = {
                str(rows): round(1e3 * rows / STEPS_PER_SECOND / found[str(rows)], 1) for rows in sizes
            }
        del decoder


def burst_stage(setting: Setting, figures: Figures) -> None:
    """See the module."""
    items = burst(setting.size.scale, setting.size.speeches)
    speeches = [Speech(0.0, item.steps, item.steps, stream=True) for item in items]
    card = WallCard(setting, speeches)
    figures.update(start_seconds=card.start_seconds, slots=card.caps.slots)
    rounds: list[Figures] = []
    for _ in range(3):
        callers = card.replay(Policy(max_delay=math.inf, max_waiting=len(speeches)))
        seconds = max(caller.ended or math.inf for caller in callers)
        first = [caller.first_audio or math.inf for caller in callers]
        rounds.append(
            {
                "audio_s_per_s": round(sum(each.audio_seconds for each in speeches) / seconds, 1),
                "first_audio_ms_p50": _ms(quantile(first, 0.5)),
                "first_audio_ms_p95": _ms(quantile(first, 0.95)),
                "memory_bytes": _memory(setting),
            }
        )
        figures["rounds"] = rounds


def streams(setting: Setting, figures: Figures) -> None:
    """See the module."""
    card = WallCard(setting, [])
    for count in setting.size.streams:
        chance = random.Random(count)
        speeches = [Speech(chance.random(), *_length(setting, chance), stream=True) for _ in range(count)]
        card.speeches = sorted(speeches, key=lambda speech: speech.at)
        callers = card.replay(Policy())
        first = [(caller.first_audio or math.inf) - caller.speech.at for caller in callers]
        gaps = sorted(caller.worst_gap for caller in callers)
        figures[str(count)] = {
            "first_audio_ms_p50": _ms(quantile(first, 0.5)),
            "first_audio_ms_p95": _ms(quantile(first, 0.95)),
            "worst_underrun_ms": _ms(gaps[-1]),
            "without_underrun_of_100_ms": round(sum(gap <= 0.1 for gap in gaps) / count, 3),
            "failed": sum(caller.error is not None for caller in callers),
        }


def night(setting: Setting, figures: Figures) -> None:
    """See the module."""
    chance, at, speeches = random.Random(11), 0.0, []
    rate = setting.size.night_rate * (1 - REPEATS)
    while (at := at + chance.expovariate(rate)) < setting.size.night_seconds:
        speeches.append(Speech(at, *_length(setting, chance)))
    callers = WallCard(setting, speeches).replay(Policy())
    heard = [caller.latency for caller in callers if caller.error is None]
    figures.update(
        requests_per_s=setting.size.night_rate,
        computed_per_s=round(rate, 1),
        last_byte_ms_p50=_ms(quantile(heard, 0.5)),
        last_byte_ms_p99=_ms(quantile(heard, 0.99)),
        refused_share=round(1 - len(heard) / len(callers), 4),
        audio_s_per_s=round(sum(each.audio_seconds for each in speeches) / setting.size.night_seconds, 1),
    )


def upstream_stage(setting: Setting, figures: Figures, *, compiled: bool = False) -> None:
    """See the module."""
    chat = load_upstream(setting.checkpoint, setting.device)
    if compiled:
        chat.gpt.gpt.forward = torch.compile(chat.gpt.gpt.forward, backend="inductor", dynamic=True)
    reference = Upstream(chat, time.perf_counter)
    batch, began = setting.size.upstream_batch, time.perf_counter()
    reference.speak(batches(burst(0.05), batch)[0])
    figures.update(batch=batch, warm_up_s=round(time.perf_counter() - began, 1))
    groups = batches(burst(setting.size.scale, setting.size.speeches), batch)
    # A part of them is enough: each batch takes as long as its longest.
    spoken, seconds = 0.0, 0.0
    for group in groups[:: max(1, len(groups) // 2)]:
        seconds += reference.speak(group).seconds
        spoken += sum(item.steps for item in group) / STEPS_PER_SECOND
        figures.update(audio_s=round(spoken, 1), audio_s_per_s=round(spoken / seconds, 2))


STAGES: Mapping[str, Callable[[Setting, Figures], None]] = {
    "machine": machine,
    "correct": correct,
    "steps": steps,
    "burst": burst_stage,
    "streams": streams,
    "night": night,
    "upstream": upstream_stage,
    "upstream_compiled": partial(upstream_stage, compiled=True),
}


# -- what they are made of --------------------------------------------------------------------------------------------


class WallCard(ChatTTSEngine):
    """The engine as a `bench.virtual.Card`: rows end where the trace says, on the clock of the wall."""

    def __init__(self, setting: Setting, speeches: Sequence[Speech]) -> None:
        self.speeches: Sequence[Speech] = speeches
        slots = max(setting.size.rows)
        super().__init__(
            ChatTTSSettings(
                folder=setting.checkpoint,
                check_sums=False,
                device=setting.device,
                dtype=setting.dtype,
                slots=slots,
                max_steps=LENGTH,
            )
        )
        self.caps = replace(self.caps, predict=self._foretell)
        self._began = 0.0

    @property
    def now(self) -> float:
        """Seconds since the replay began."""
        return time.perf_counter() - self._began

    @now.setter
    def now(self, moment: float) -> None:
        time.sleep(max(0.0, moment - self.now))

    def replay(self, policy: Policy) -> list[Caller]:
        """Speaks to all."""
        self._began = time.perf_counter()
        return Replay(self, policy).run().callers

    def _foretell(self, segment: Segment) -> Prediction:
        likely = self.speeches[segment.seed].likely_steps
        return Prediction(len(self._text(segment)) + 8, likely, math.ceil(1.25 * likely))

    def _text(self, segment: Segment) -> str:
        return "好" * math.ceil(self.speeches[segment.seed].likely_steps / STEPS_PER_SECOND * CHARACTERS_PER_SECOND)

    def _speaking(self, segment: Segment, refined: str | None = None) -> Row:
        speech = self.speeches[segment.seed]
        asked = replace(segment, text=self._text(segment), voice=VOICES[segment.seed % len(VOICES)], language="zh-CN")
        row = super()._speaking(asked, refined)
        row.drawing = replace(row.drawing, min_steps=speech.steps, max_steps=speech.steps)
        return row


def best_of(times: int, setting: Setting, work: Callable[[], object]) -> float:
    """Seconds."""
    found = []
    for _ in range(times):
        setting.wait()
        began = time.perf_counter()
        work()
        setting.wait()
        found.append(time.perf_counter() - began)
    return min(found)


def machine_rate(setting: Setting) -> float:
    """Bytes a second that the card reads and writes, as `machine` found it."""
    block = torch.empty(1 << (30 if setting.device == "cuda" else 24), dtype=torch.uint8, device=setting.device)
    other = torch.empty_like(block)
    return 2 * block.numel() / best_of(5, setting, lambda: other.copy_(block))


def _length(setting: Setting, chance: random.Random) -> tuple[int, int]:
    actual, likely = lengths(chance, MEAN_SECONDS, LONGEST_SECONDS)
    return max(1, round(actual * setting.size.scale)), max(1, round(likely * setting.size.scale))


def _row(seed: int, steps: int, tokens: int = 23, **fields: Any) -> Row:
    prompt = Prompt(list(range(100, 100 + tokens)))
    return Row(prompt, drawing=Drawing(min_steps=steps, max_steps=steps, seed=seed, **fields))


def _ms(seconds: float) -> float | None:
    """Milliseconds; None for what never came."""
    return round(1e3 * seconds, 1) if math.isfinite(seconds) else None


def _step_ms(setting: Setting, decoder: Decoder, rows: int) -> float:
    """Of a step in the middle of speeches, without the host's waiting for each."""
    return min(_stepped_ms(setting, decoder, rows) for _ in range(3))


def _stepped_ms(setting: Setting, decoder: Decoder, rows: int) -> float:
    count = setting.size.steps
    tokens = KV_TOKENS - count // 2 - 2
    for start in range(0, rows, 16):
        decoder.advance([[_row(n, LENGTH, tokens) for n in range(start, min(start + 16, rows))]], 0)
    decoder.advance([], 2)
    try:
        return round(1e3 * best_of(1, setting, lambda: decoder.advance([], count)) / count, 4)
    finally:
        decoder.clear()


def _bytes(weights: Weights, rows: int) -> int:
    """What a step must read."""
    d = weights.dimensions
    cache = 2 * d.layers * d.heads * d.head_dim * KV_TOKENS * weights.dtype.itemsize
    layers: int = sum(each.nbytes for each in weights.gpt.values())
    return layers + weights.head_audio.nbytes + rows * cache


def _spoken(decoder: Decoder, rows: int, steps: int) -> list[Row]:
    spoken = [_row(seed, steps, 32) for seed in range(rows)]
    decoder.advance([spoken[: rows // 2], spoken[rows // 2 :]], 0)
    while decoder.rows:
        decoder.advance([], 1)
    return spoken


def _match(rows: Sequence[Row], others: Sequence[Row]) -> float:
    """Tokens up to each row's first that differs, of all."""
    matching = 0
    for row, other in zip(rows, others, strict=True):
        same = (row.tokens == other.tokens).all(axis=1)
        matching += len(same) if same.all() else int(same.argmin())
    return round(matching / sum(row.done for row in rows), 4)


def _waits(setting: Setting) -> str | None:
    """What waits for the device while streams come and go; torch tells of it, where there is a GPU."""
    card = WallCard(setting, [Speech(0.01 * n, 40 + n, 40, stream=True) for n in range(6)])
    card.replay(Policy())
    try:
        if setting.device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        card.replay(Policy())
    except RuntimeError as error:
        return str(error)[:200]
    finally:
        if setting.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return None


def _vocoder_error(setting: Setting, weights: Weights) -> float:
    """Relative, beside the same on the CPU in fp64."""
    hidden = torch.randn(120, weights.dimensions.hidden, generator=torch.Generator().manual_seed(1))

    def made(device: str, dtype: torch.dtype) -> Tensor:
        decoder, vocos = (
            {name: t.to(device, dtype) for name, t in part.items()} for part in (weights.decoder, weights.vocos)
        )
        vocoder = Vocoder(decoder, vocos)
        state = vocoder.begin()
        parts = [hidden[:40], hidden[40:100], hidden[100:]]
        work = [VocoderWork(state, part.to(device, dtype), last=part is parts[-1]) for part in parts]
        return torch.cat([vocoder.run([each]).samples for each in work]).double().cpu()

    exact = made("cpu", torch.float64)
    error = (made(setting.device, torch.float32) - exact).norm() / exact.norm()
    return float(f"{error:.2e}")


def _memory(setting: Setting) -> int:
    return torch.cuda.memory_reserved() if setting.device == "cuda" else 0


# -- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--folder", type=Path, required=True, help="results")
    parser.add_argument("--checkpoint", type=Path, help="random weights; default: a folder among the results")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dry", action="store_true", help="tiny weights and few of everything")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(args.device, args.checkpoint or args.folder / "checkpoint", DRY if args.dry else REAL)
    figures = Saved(args.folder / f"{args.stage}.json")
    began = time.perf_counter()
    try:
        with torch.inference_mode():
            STAGES[args.stage](setting, figures)
    except Exception as error:
        figures["error"] = f"{type(error).__name__}: {error}"[:300]
        raise
    finally:
        figures["took_s"] = round(time.perf_counter() - began, 1)
        print(f"{args.stage}: {json.dumps(figures)}")


class Saved(Figures):
    """Figures that are in a file as soon as they are found: whatever comes later, they are not lost."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._path.write_text(json.dumps(self))

    def update(self, *others: Mapping[str, Any], **named: Any) -> None:  # type: ignore[override]
        """Several at once."""
        for name, value in {**dict(*others), **named}.items():
            self[name] = value


if __name__ == "__main__":
    main()
