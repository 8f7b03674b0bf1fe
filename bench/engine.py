"""What ChatTTS costs on this CPU, beside unmodified upstream: a step, and a burst of speeches.

    python -m bench.engine [--quick] [--json] [--threads 1]

Weights are random and of full size, prompts have 23 tokens, rows never end. Upstream and ours take turns, and each
figure is the minimum over the rounds: other work on the machine only adds. Milliseconds are CPU time of all threads;
with one thread, which is the default, that is the time a step would take on a machine with nothing else to do.

`ms_per_step`: of a pass for so many rows, with sampling. `step_ratio`: upstream's over ours, in fp32 and with the best
type. `limit_ms_per_step`: weights read once, at the rate at which this machine reads a large block.
`rtf_single`: computing time over playing time for one row, vocoder included; `rtf_single_wall` by the wall, with as
many threads as there are cores, which is how long one caller waits while nobody else does. `tie_rate`: tokens at
temperature 1e-5 that differ from upstream's at a gap of at most 1e-4, of all; a difference at a wider gap ends the
benchmark. `match_rate_fast_mode`: tokens at the usual temperature that are the same alone and in a batch, up to the
first that is not, of all. `rpc_load_slowdown`: wall time of a plan of one step of 8 rows, given to an engine in a
process of its own, where a service has it, beside a thread here that runs Python half of the time; over without
(medians, in alternating rounds). `process_tick_ms`: what that process costs a plan, for so many rows.

`int8_logit_error`, `int8_greedy_match`: int8 beside fp32, led by fp32's tokens; see `docs/decisions/cpu-products.md`.

The burst: 32 speeches at once in 4 voices, log-normal lengths of 1 to 12 s times `scale`, for both on the same trace of
ends (`bench/burst.py` says how they are made to obey). `upstream_audio_s_per_s` is at the better of its batch sizes;
`ratio_best` compares with the type that is quickest here, `ratio_fp32` with fp32. `scheduling_factor`: that type's time
with upstream's batches, each row to the longest of its batch, over its time with the scheduler. Upstream's `infer` is
heard when its batch is done.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch

from batcher.engine import Join, Plan, RowRef, Segment
from bench.burst import COUNT, VOICES, Chorus, Spoken, Upstream, batches, burst, in_row, load_endless, to_the_longest
from bench.canned import tick_ms
from bench.report import metadata, quantile
from common.process import SWITCH_SECONDS
from common.settings import ChatTTSSettings, Settings
from service.engines.chattts.checkpoint import SIZES, make_checkpoint
from service.engines.chattts.costs import measure_vocoder
from service.engines.chattts.decode import Decoder, Drawing, Row
from service.engines.chattts.linear import has_bf16
from service.engines.chattts.load import Weights, load_weights
from service.engines.chattts.prompt import Prompt, Prompter
from service.engines.chattts.upstream import import_chattts, load_upstream
from service.engines.chattts.vocode import Vocoder
from service.engines.process import EngineProcess

STEPS_PER_SECOND = 46.875
PROMPT_TOKENS = 23
BATCHES = (1, 8, 32)
LENGTH = 512
MAX_STEPS = 1024
TIE = 1e-4
READ_BYTES = 1 << 28
Dtype = Literal["fp32", "bf16", "int8"]
DTYPES: tuple[Dtype, ...] = ("fp32", "bf16", "int8") if has_bf16() else ("fp32", "int8")
NOT_MEASURED = () if has_bf16() else ("bf16, which this processor would have to emulate",)

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Size:
    """How much to measure."""

    weights: str
    rounds: int
    steps: int
    """Timed in each round."""
    compared: int
    """Steps that are compared token by token."""
    scale: float
    """Of the burst's lengths."""
    batches: Sequence[int]
    """Batch sizes at which upstream gets the burst."""


TINY = Size("tiny", rounds=1, steps=2, compared=8, scale=0.05, batches=(8,))
QUICK = Size("full", rounds=2, steps=3, compared=12, scale=0.1, batches=(8,))
FULL = Size("full", rounds=6, steps=8, compared=200, scale=1.0, batches=(4, 8))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about five minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = TINY if args.tiny else QUICK if args.quick else FULL
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), SIZES[size.weights])
        report = _metadata(size) | measure(Path(folder), size)
    print(json.dumps(report) if args.json else _table(report))


@torch.inference_mode()
def measure(folder: Path, size: Size) -> Figures:
    """All figures."""
    upstream = load_upstream(folder)
    weights = {name: load_weights(folder, "cpu", name, check_sums=False) for name in DTYPES}
    ours: dict[str, Decoder] = {name: _decoder(each) for name, each in weights.items()}
    vocoder_ms = 1e3 * STEPS_PER_SECOND * _vocoder_seconds(weights["fp32"])
    steps: dict[str, dict[str, float]] = {name: {} for name in ("upstream", *DTYPES)}
    for rows in BATCHES:
        ways: dict[str, Callable[[], list[float]]] = {
            "upstream": lambda rows=rows: _upstream_steps(upstream, rows, size.steps),  # type: ignore[misc]
            **{name: lambda each=each, rows=rows: _our_steps(each, rows, size.steps) for name, each in ours.items()},  # type: ignore[misc]
        }
        found = [{name: min(way()) for name, way in ways.items()} for _ in range(size.rounds)]
        for name in ways:
            steps[name][str(rows)] = round(1e3 * min(each[name] for each in found), 2)
    best = {rows: min(steps[name][rows] for name in DTYPES) for rows in steps["fp32"]}
    return {
        **{f"{name}_ms_per_step": each for name, each in steps.items()},
        "step_ratio_fp32": {rows: round(steps["upstream"][rows] / ms, 3) for rows, ms in steps["fp32"].items()},
        "step_ratio_best": {rows: round(steps["upstream"][rows] / ms, 3) for rows, ms in best.items()},
        "limit_ms_per_step": {name: round(1e3 * _limit(each), 2) for name, each in weights.items()},
        "vocoder_ms_per_audio_s": round(vocoder_ms, 2),
        "rtf_single": round((best["1"] * STEPS_PER_SECOND + vocoder_ms) / 1e3, 3),
        "rtf_single_wall": {name: round(_rtf_wall(each, weights["fp32"], size), 3) for name, each in ours.items()},
        "tie_rate": tie_rate(upstream, weights["fp32"], ours["fp32"], size.compared),
        "match_rate_fast_mode": {name: match_rate(each, size.compared) for name, each in ours.items()},
        **_accuracy(weights["fp32"], ours, size.compared),
        **_burst(folder, upstream, size),
        "rpc_load_slowdown": {name: round(_slowdown(folder, name, size), 3) for name in DTYPES},
        "process_tick_ms": tick_ms(),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "not_measured": NOT_MEASURED,
    }


def _burst(folder: Path, upstream: Any, size: Size) -> Figures:
    """See the module."""
    items = burst(size.scale)
    seconds = sum(item.steps for item in items) / STEPS_PER_SECOND
    chorus = {name: _chorus(folder, name) for name in DTYPES}
    theirs = {rows: in_row(Upstream(upstream).speak, batches(items, rows)) for rows in size.batches}
    ours = {name: each.speak(items) for name, each in chorus.items()}
    best = min(theirs, key=lambda rows: theirs[rows].seconds)
    heard: dict[str, Spoken] = {str(name): each for name, each in ours.items()}
    dtype = min(ours, key=lambda name: ours[name].seconds)
    static = in_row(chorus[dtype].speak, to_the_longest(batches(items, best)))
    return {
        "scale": size.scale,
        "audio_s": round(seconds, 1),
        "chorus_audio_s_per_s": {name: round(seconds / each.seconds, 3) for name, each in ours.items()},
        "upstream_audio_s_per_s": {rows: round(seconds / each.seconds, 3) for rows, each in theirs.items()},
        "ratio_best": round(theirs[best].seconds / ours[dtype].seconds, 2),
        "best_dtype": dtype,
        "ratio_fp32": round(theirs[best].seconds / ours["fp32"].seconds, 2),
        "scheduling_factor": round(static.seconds / ours[dtype].seconds, 2),
        "first_audio_ms_p50": _first_audio({**heard, "upstream": theirs[best]}, 0.5),
        "first_audio_ms_p95": _first_audio({**heard, "upstream": theirs[best]}, 0.95),
    }


def _chorus(folder: Path, dtype: Dtype) -> Chorus:
    return Chorus(_settings(folder, dtype))


def _settings(folder: Path, dtype: Dtype) -> ChatTTSSettings:
    threads = torch.get_num_threads()
    return ChatTTSSettings(
        folder=folder, check_sums=False, device="cpu", dtype=dtype, slots=COUNT, threads=threads, max_steps=MAX_STEPS
    )


def _first_audio(spoken: Mapping[str, Spoken], share: float) -> dict[str, int]:
    """Milliseconds that this share of the speeches take at most until their first sample."""
    return {name: round(1e3 * quantile([*each.first_audio], share)) for name, each in spoken.items()}


def _accuracy(weights: Weights, ours: Mapping[str, Decoder], steps: int) -> Figures:
    """Of int8 beside fp32: the logits' relative error, and the share of greedy tokens that are the same.

    Both take fp32's tokens, so that differences do not add up.
    """
    exact, rounded = ([*_rows(8, steps, temperature=1e-5, penalty=1.0)] for _ in range(2))
    _run(ours["fp32"], exact)
    ours["int8"].advance([rounded], 0)
    for step in range(steps):
        for row, other in zip(exact, rounded, strict=True):
            if not other.over:
                ours["int8"].force(other, row.tokens[step])
        if ours["int8"].rows:
            ours["int8"].advance([], 1)
    head = weights.head_audio.flatten(0, 1)
    true, found = (torch.cat([row.hidden(0, steps) for row in rows]) @ head.T for rows in (exact, rounded))
    same = np.mean([row.tokens == other.tokens for row, other in zip(exact, rounded, strict=True)])
    return {
        "int8_logit_error": round(float((found - true).norm() / true.norm()), 4),
        "int8_greedy_match": round(float(same), 4),
    }


def _decoder(weights: Weights) -> Decoder:
    return Decoder(weights, max(BATCHES), LENGTH, Prompter(weights.tokenizer).refine_end)


def _rows(count: int, steps: int, **fields: Any) -> list[Row]:
    """That draw so many steps, with seeds of their own."""
    prompt = Prompt(list(range(100, 100 + PROMPT_TOKENS)))
    return [Row(prompt, drawing=Drawing(min_steps=steps, max_steps=steps, seed=n, **fields)) for n in range(count)]


def _our_steps(decoder: Decoder, rows: int, steps: int) -> list[float]:
    """Seconds of CPU of each step."""
    decoder.advance([_rows(rows, steps + 2)], 1)
    try:
        return [_cpu_seconds(lambda: decoder.advance([], 1)) for _ in range(steps)]
    finally:
        decoder.clear()


def _upstream_steps(upstream: Any, rows: int, steps: int) -> list[float]:
    """Seconds of CPU between passes, which upstream's own model tells when it is called."""
    calls: list[float] = []
    hook = upstream.gpt.gpt.register_forward_pre_hook(lambda *_: calls.append(time.process_time()))
    try:
        _generate(upstream, _upstream_ids(rows), steps + 2, temperature=0.3)
    finally:
        hook.remove()
    return [after - before for before, after in pairwise(calls[1:])]


def _upstream_ids(rows: int) -> torch.Tensor:
    return torch.arange(100, 100 + PROMPT_TOKENS)[None, :, None].expand(rows, -1, 4).contiguous()


def _generate(upstream: Any, ids: torch.Tensor, steps: int, temperature: float, penalty: float = 1.05) -> Any:
    warpers, processors = import_chattts().model.gen_logits(625, 0.7, 20, penalty)
    ids = ids.to(upstream.device)
    mask = torch.ones(ids.shape[:2], dtype=torch.bool, device=upstream.device)
    (result,) = upstream.gpt.generate(
        upstream.embed(ids, mask),
        ids,
        temperature=torch.full((4,), temperature, device=upstream.device),
        eos_token=625,
        attention_mask=mask,
        max_new_token=steps,
        min_new_token=steps,
        logits_processors=(*processors, *warpers),
        return_hidden=True,
        show_tqdm=False,
    )
    return result


def tie_rate(upstream: Any, weights: Weights, decoder: Decoder, steps: int) -> float:
    """See the module.

    Raises:
        ArithmeticError: a token differs although the reference clearly preferred its own.
    """
    result = _generate(upstream, _upstream_ids(1), steps, temperature=1e-5, penalty=1.0)
    tokens, hidden = result.ids[0].cpu().numpy(), result.hiddens[0]
    (row,) = rows = _rows(1, steps, temperature=1e-5, penalty=1.0)
    ties = 0
    for step in range(steps):
        decoder.advance([rows] if step == 0 else [], 0 if step == 0 else 1)
        for codebook in np.flatnonzero(row.tokens[-1] != tokens[step]):
            logits = weights.head_audio[codebook] @ hidden[step]
            gap = float(abs(logits[tokens[step, codebook]] - logits[row.tokens[-1][codebook]]))
            if gap > TIE:
                raise ArithmeticError(f"step {step}, codebook {codebook}: a gap of {gap}")
            ties += 1
        if not row.over:
            decoder.force(row, tokens[step])
    return ties / int(tokens.size)


def match_rate(decoder: Decoder, steps: int, count: int = 8) -> float:
    """See the module."""
    together = _rows(count, steps)
    _run(decoder, together)
    matching = 0
    for row, other in zip(_rows(count, steps), together, strict=True):
        _run(decoder, [row])
        differing = np.flatnonzero((row.tokens != other.tokens).any(axis=-1))
        matching += int(differing[0]) if len(differing) else steps
    return round(matching / (count * steps), 4)


def _run(decoder: Decoder, rows: Sequence[Row]) -> None:
    decoder.advance([rows], 0)
    while decoder.rows:
        decoder.advance([], 1)


def _rtf_wall(decoder: Decoder, weights: Weights, size: Size) -> float:
    """See the module."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        step = min(_wall_step(decoder, size.steps, rows=1) for _ in range(size.rounds))
        return (step + _vocoder_seconds(weights)) * STEPS_PER_SECOND
    finally:
        torch.set_num_threads(before)


def _wall_step(decoder: Decoder, steps: int, rows: int) -> float:
    decoder.advance([_rows(rows, steps + 2)], 1)
    try:
        return min(_wall_seconds(lambda: decoder.advance([], 1)) for _ in range(steps))
    finally:
        decoder.clear()


def _slowdown(folder: Path, dtype: Dtype, size: Size) -> float:
    """See the module."""
    engine = EngineProcess(load_endless, Settings(chattts=_settings(folder, dtype)), stall_seconds=60.0)
    rows = (Segment("一二三四五六七八", VOICES[0], "zh-CN", seed=number) for number in range(8))
    joins = tuple(Join(RowRef(number, number, 0), row) for number, row in enumerate(rows))
    idle, busy = [], []
    try:
        engine.run(Plan(joins=(joins,), steps=1))
        for _ in range(3 * size.rounds):
            idle += [_wall_seconds(lambda: engine.run(Plan(steps=1))) for _ in range(2 * size.steps)]
            with _busy_python():
                busy += [_wall_seconds(lambda: engine.run(Plan(steps=1))) for _ in range(2 * size.steps)]
    finally:
        engine.close()
    return median(busy) / median(idle)


@contextmanager
def _busy_python() -> Iterator[None]:
    """A thread that runs Python half of the time, as a busy event loop does."""
    stopping = threading.Event()

    def serve() -> None:
        while not stopping.is_set():
            until = time.monotonic() + 0.001
            while time.monotonic() < until:
                pass
            time.sleep(0.001)

    busy = threading.Thread(target=serve)
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    busy.start()
    try:
        yield
    finally:
        stopping.set()
        busy.join()
        sys.setswitchinterval(before)


def _limit(weights: Weights) -> float:
    """Seconds to read what a step of one row must read."""
    layers: int = sum(each.numel() if weights.int8 else each.nbytes for each in weights.gpt.values())
    return (layers + weights.head_audio.nbytes) / _bytes_per_second()


def _bytes_per_second() -> float:
    block = torch.ones(READ_BYTES // 4)
    return READ_BYTES / min(_cpu_seconds(block.sum) for _ in range(5))


def _vocoder_seconds(weights: Weights) -> float:
    vocoder = Vocoder(weights.decoder, weights.vocos)
    return measure_vocoder(vocoder, weights.dimensions.hidden, weights.device)


def _cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _wall_seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _metadata(size: Size) -> Figures:
    return metadata() | {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "weights": size.weights,
        "rounds": size.rounds,
    }


def _table(report: Mapping[str, Any]) -> str:
    return "\n".join(f"{key:<24} {value}" for key, value in report.items())


if __name__ == "__main__":
    main()
