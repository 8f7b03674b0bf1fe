"""What steps and prefills take on this machine, measured once at the start: the scheduler reckons with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from operator import add

import torch

from service.engines.chattts.decode import Decoder, Drawing, Row
from service.engines.chattts.estimates import Costs
from service.engines.chattts.prompt import Prompt
from service.engines.chattts.vocode import Vocoder, VocoderWork

TOKENS = 16
"""Of each prompt."""
TIMES = 3
"""That each is timed; the quickest counts."""
STEPS = {"cpu": 1, "cuda": 8}
"""At a time: on a GPU the host's part of them is done meanwhile, as when it serves."""
BLOCK = 24
"""Steps that are vocoded at once."""


@torch.inference_mode()
def measure(decoder: Decoder, vocoder: Vocoder) -> Costs:
    """Decodes and vocodes nonsense at a few widths. It also warms up what is slow the first time."""
    widths = sorted({1, -(-decoder.slots // 4), decoder.slots})
    decoded = [_decoding(decoder, width) for width in widths]
    vocoded = measure_vocoder(vocoder, decoder.hidden_size, decoder.device, most_vocoded(decoder.slots))
    # On a GPU the vocoder goes on beside the decoder.
    both = max if decoder.device.type == "cuda" else add
    return Costs(
        widths=widths,
        steps=[both(seconds, vocoded * width) for width, (_, seconds) in zip(widths, decoded, strict=True)],
        prefill_tokens=[TOKENS * width for width in widths],
        prefills=[prefill for prefill, _ in decoded],
    )


def _decoding(decoder: Decoder, rows: int) -> tuple[float, float]:
    """Seconds of a prefill, and of a step."""
    count = STEPS[decoder.device.type]
    steps = count * TIMES + 9
    drawing = Drawing(min_steps=steps, max_steps=steps)
    prompt = Prompt(list(range(1, TOKENS + 1)))
    try:
        prefill = _seconds(lambda: decoder.advance([[Row(prompt, drawing=drawing) for _ in range(rows)]], 0))
        decoder.advance([], 1)
        step = min(_seconds(lambda: decoder.advance([], count)) for _ in range(TIMES)) / count
    finally:
        decoder.clear()
    return prefill, step


@torch.inference_mode()
def measure_vocoder(vocoder: Vocoder, hidden_size: int, device: torch.device, rows: int = 1) -> float:
    """Seconds for a step of one row, in blocks of so many rows."""
    block, states = torch.zeros(BLOCK, hidden_size, device=device), [vocoder.begin() for _ in range(rows)]
    work = [VocoderWork(state, block) for state in states]
    for _ in range(vocoder.lookahead_steps // BLOCK + 1):
        vocoder.run(work)

    def once() -> None:
        vocoder.run(work).samples.cpu()

    return min(_seconds(once) for _ in range(TIMES)) / (BLOCK * rows)


def most_vocoded(slots: int) -> int:
    """Rows that are vocoded at once: with blocks of 24 steps, a 24th of all has its turn at each, and some catch up."""
    return max(1, slots // 8)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
