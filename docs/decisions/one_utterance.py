"""Draws `one-utterance.png`. Needs matplotlib: `python -m docs.decisions.one_utterance`; a minute on two cores.

A full-size checkpoint with random weights is made for it (1.1 GB, in a temporary folder), unless a folder is named.
"""

from __future__ import annotations

import asyncio
import math
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from batcher.engine import Sampling, Segment
from batcher.policy import Policy
from batcher.request import Audio, RequestEnded, RequestFailed
from batcher.runner import Runner
from common.settings import ChatTTSSettings
from service.engines.chattts.checkpoint import SIZES, make_checkpoint
from service.engines.chattts.engine import ChatTTSEngine
from service.engines.chattts.upstream import import_chattts, load_upstream
from service.engines.chattts.voices import draw_speaker, read_voices
from service.voices import DEFAULT_VOICE

RATE = 24_000
STEPS = 150
TEXT = "the quick brown fox jumps over the lazy dog"
FULL_SCALE = 32_767
ALWAYS_THE_LIKELIEST = 1e-5

Wave = NDArray[np.float64]


def main() -> None:
    """The command."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(sys.argv[1] if sys.argv[1:] else folder)
        if not sys.argv[1:]:
            make_checkpoint(checkpoint, SIZES["full"])
        reference = _upstream(checkpoint)
        stream, unary = asyncio.run(_ours(checkpoint))
    ways = {"upstream, whole": reference, "ours, from a stream": stream, "ours, unary": unary}
    figure, axes = plt.subplots(2, len(ways), figsize=(15, 6), sharex=True, layout="constrained", height_ratios=(3, 1))
    for (above, below), (name, wave) in zip(axes.T, ways.items(), strict=True):
        above.specgram(wave + 1e-9, NFFT=1024, noverlap=768, Fs=RATE, vmin=-130, vmax=-40)
        above.set(title=f"{name}: {len(wave)} samples", ylabel="Hz")
        below.plot(np.arange(len(reference)) / RATE, (wave - reference) * FULL_SCALE, linewidth=0.3)
        below.set(title="less upstream's", ylabel="16-bit steps", xlabel="seconds", ylim=(-3, 3))
    figure.savefig(Path(__file__).with_name("one-utterance.png"), dpi=60)
    print(f"largest difference: {max(abs(wave - reference).max() for wave in (stream, unary)) * FULL_SCALE:.2f}")


def _upstream(checkpoint: Path) -> Wave:
    """What `Chat` speaks, before it deletes what is near silence."""
    chat = load_upstream(checkpoint)
    seed = read_voices()[DEFAULT_VOICE].seed
    assert seed is not None
    speaker = chat.speaker._encode(draw_speaker(seed, chat.speaker.std, chat.speaker.mean))
    asked = import_chattts().Chat.InferCodeParams(
        temperature=ALWAYS_THE_LIKELIEST, max_new_token=STEPS, spk_emb=speaker, show_tqdm=False
    )
    (result,) = chat._infer_code([TEXT], False, chat.device, True, asked)
    (wave,) = chat._decode_to_wavs(result.hiddens, True)
    return np.asarray(wave, dtype=np.float64)


async def _ours(checkpoint: Path) -> list[Wave]:
    """From a stream, and unary."""
    engine = ChatTTSEngine(ChatTTSSettings(folder=checkpoint, check_sums=False, dtype="fp32", max_steps=STEPS, slots=2))
    runner = Runner(engine, Policy(max_delay=math.inf))
    runner.start()
    try:
        return [await _speak(runner, stream=stream) for stream in (True, False)]
    finally:
        await runner.stop()


async def _speak(runner: Runner, *, stream: bool) -> Wave:
    segment = Segment(TEXT, DEFAULT_VOICE, "en-US", sampling=Sampling(temperature=ALWAYS_THE_LIKELIEST))
    heard = b""
    async with runner.speak([segment], max_rows=1, stream=stream) as speaking:
        while not isinstance(event := await speaking.get(), RequestEnded):
            assert not isinstance(event, RequestFailed), event
            if isinstance(event, Audio):
                heard += event.data
    return np.frombuffer(heard, dtype="<i2") / FULL_SCALE


if __name__ == "__main__":
    main()
