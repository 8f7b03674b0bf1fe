"""What upstream gets wrong, and ours must not: each fault shown on unmodified upstream 0.2.5, and ours beside it.

| what is wrong | test, here or in `test_chattts_….py` |
| --- | --- |
| 1. one speaker and one manner for a whole batch | `test_one_batch_has_many_voices` |
| | engine: `test_every_row_has_its_own_voice_and_manner_and_nothing_leaks` |
| 2. finished rows compute on until the longest ends | `test_a_row_that_has_ended_computes_no_more` |
| 3. a row that ends at once takes the batch with it | `test_a_row_that_ends_at_once_takes_the_batch_with_it` |
| | decode: `test_a_row_that_would_end_at_once_is_tried_again_alone`, `…always_ends_at_once_fails_alone` |
| 4. seeded anew at each step; draws depend on the row | `test_a_seed_means_the_same_in_every_row` |
| | decode: `test_in_deterministic_mode_a_row_is_the_same_bit_for_bit_in_any_company` |
| 5. no repetition penalty for rows past the 156th | sample: `test_the_penalty_has_no_last_row` |
| 6. a call's voice stays for later calls | `test_nothing_of_a_call_stays_for_the_next` |
| 7. short rows get tails of noise and other ends | `test_a_row_has_its_own_length` |
| 8. streams decode prefixes anew, start late, have joins | `test_a_stream_computes_each_frame_once` |
| | vocode: `test_a_stream_is_the_whole_utterance`, `test_each_frame_is_computed_once` |
| 9. streams of more than four parts lose half seconds | `test_a_stream_of_many_parts_loses_nothing` |
| 10. samples near silence are deleted, in speech too | `test_silence_is_kept` |
| 11. one flag interrupts all, and any call clears it | `test_a_cancel_is_of_one_request` |
| 12. refining fails with a penalty | decode: `test_refining_takes_a_repetition_penalty_which_upstream_cannot` |
| 13. a mode that needs a vLLM of years ago | `test_nothing_needs_vllm` |
"""

from __future__ import annotations

import asyncio
import inspect
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batcher.engine import Plan, Sampling, Vocode
from batcher.policy import Policy
from batcher.request import Audio, RequestEnded, SegmentEnded
from batcher.runner import Runner
from service.engines.chattts.decode import Drawing
from service.engines.chattts.engine import ChatTTSEngine
from service.engines.chattts.load import load_weights
from service.engines.chattts.network import Network
from service.engines.chattts.upstream import import_chattts
from service.engines.chattts.vocode import Vocoder, VocoderWork
from tests.test_chattts_decode import Asker, new_decoder, run
from tests.test_chattts_engine import PATIENCE, STEP, Driver, segment, settings_for

WILD: dict[str, Any] = {"temperature": 1.0, "top_P": 1.0, "top_K": 600}


@pytest.fixture(scope="module")
def shared(tiny_checkpoint: Path) -> ChatTTSEngine:
    return ChatTTSEngine(settings_for(tiny_checkpoint))


@pytest.fixture
def engine(shared: ChatTTSEngine) -> Iterator[ChatTTSEngine]:
    """An engine that nobody uses, before and after."""
    yield shared
    shared.close()


def parameters(chat: Any, steps: int | None = None, **fields: Any) -> Any:
    """Upstream's, in one voice. `steps`: exactly so many."""
    torch.manual_seed(5)
    fields |= {} if steps is None else {"min_new_token": steps, "max_new_token": steps}
    return import_chattts().Chat.InferCodeParams(
        **{"spk_emb": chat.sample_random_speaker(), "show_tqdm": False} | fields
    )


def generate(chat: Any, texts: list[str], asked: Any) -> list[Any]:
    """Upstream's tokens, each [steps, codebooks]."""
    (result,) = chat._infer_code(texts, False, chat.device, True, asked)
    return [ids.numpy() for ids in result.ids]


def speak(chat: Any, texts: list[str], asked: Any, **options: Any) -> Any:
    return chat.infer(texts, skip_refine_text=True, params_infer_code=asked, **{"split_text": False} | options)


def whole_samples(steps: int) -> int:
    return STEP * steps - STEP // 2


def noted(monkeypatch: pytest.MonkeyPatch, kind: type, method: str) -> list[int]:
    """How many rows each call's first argument has."""
    real = getattr(kind, method)
    counts: list[int] = []

    def note(self: Any, rows: Any, *args: Any) -> Any:
        counts.append(len(rows))
        return real(self, rows, *args)

    monkeypatch.setattr(kind, method, note)
    return counts


def test_one_batch_has_many_voices(engine: ChatTTSEngine, upstream: Any) -> None:
    voices = [upstream.sample_random_speaker() for _ in range(2)]
    with pytest.raises(Exception, match="list"):
        generate(upstream, ["hello", "hello"], parameters(upstream, 2, spk_emb=voices))
    with pytest.raises(RuntimeError):  # a list of temperatures is one for each codebook
        generate(upstream, ["hello", "hello"], parameters(upstream, 2, temperature=[0.3, 0.7]))
    driver = Driver(engine)
    asked = [segment(voice="female1"), segment(voice="male1"), segment(sampling=Sampling(temperature=0.7))]
    calls = engine.step_calls
    driver.run(Plan(joins=(tuple(driver.join(each, slot) for slot, each in enumerate(asked)),), steps=20))
    assert engine.step_calls == calls + 20, "in the same passes"
    spoken = [row.decoded.tokens.tobytes() for row in engine._rows.values()]
    assert len(set(spoken)) == len(asked)


def test_a_row_that_has_ended_computes_no_more(
    tiny_checkpoint: Path, upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    hook = upstream.gpt.gpt.register_forward_pre_hook(
        lambda module, args, named: rows.append(len(named["inputs_embeds"])), with_kwargs=True
    )
    asked = parameters(upstream, max_new_token=300, **WILD)
    torch.manual_seed(0)
    lengths = [len(tokens) for tokens in generate(upstream, ["hello", "a long text"], asked)]
    hook.remove()
    assert min(lengths) < max(lengths)
    assert set(rows) == {2}, "both to the end"

    with torch.inference_mode():
        asker = Asker(upstream)
        decoder = new_decoder(load_weights(tiny_checkpoint, "cpu", "fp32", check_sums=False), 2)
        counted = noted(monkeypatch, type(decoder._gpt), "decode")
        wild = Drawing(temperature=1.0, top_p=1.0, top_k=600, max_steps=300)
        pair = [asker.row("hello", replace(wild, seed=seed)) for seed in (1, 2)]
        run(decoder, [pair])
    short, long = sorted(row.done for row in pair)
    assert short < long
    assert counted.count(2) == short, "the pass that finds its end is its last"
    assert set(counted[short:]) == {1}


def test_a_row_that_ends_at_once_takes_the_batch_with_it(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours: `test_chattts_decode.test_a_row_that_always_ends_at_once_fails_alone`."""
    greedy = parameters(upstream, 1, temperature=1e-5)
    first, other = (tokens[0] for tokens in generate(upstream, ["hello", "where are you"], greedy))
    end = next(token for token in first if token not in other)
    monkeypatch.setattr(upstream.config.gpt, "num_audio_tokens", int(end) + 1)
    greedy = replace(greedy, min_new_token=0, max_new_token=8)
    seeded = replace(greedy, manual_seed=1)
    assert len(list(upstream._infer_code(["where are you"], False, upstream.device, True, seeded))) == 1
    texts = ["hello", "where are you"]
    assert not list(upstream._infer_code(texts, False, upstream.device, True, seeded)), "nothing for either"
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 120)
    try:
        with pytest.raises(RecursionError):
            generate(upstream, texts, greedy)
    finally:
        sys.setrecursionlimit(limit)


class Generator(torch.Generator):
    """Counts how often it is seeded."""

    seeded = 0

    def manual_seed(self, seed: int) -> torch.Generator:
        self.seeded += 1
        return super().manual_seed(seed)


def test_a_seed_means_the_same_in_every_row(
    engine: ChatTTSEngine, upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator()
    monkeypatch.setattr(upstream.gpt, "generator", generator)
    asked = parameters(upstream, 20, temperature=1.0, manual_seed=3)
    one, other = generate(upstream, ["hello", "hello"], asked)
    assert generator.seeded == 20, "each step draws with the numbers of all others"
    assert (one != other).all(axis=1).any(), "the same text and seed"
    driver = Driver(engine)
    driver.run(Plan(joins=(tuple(driver.join(segment(seed=3), slot) for slot in range(3)),), steps=20))
    first, *others = (row.decoded.tokens for row in engine._rows.values())
    assert all((tokens == first).all() for tokens in others)


def test_nothing_of_a_call_stays_for_the_next(
    engine: ChatTTSEngine, upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = inspect.signature(upstream.infer).parameters["params_infer_code"].default
    for name, value in {"max_new_token": 8, "min_new_token": 8, "show_tqdm": False, "spk_smp": None}.items():
        monkeypatch.setattr(default, name, value)
    monkeypatch.setattr(default, "txt_smp", None)
    upstream.infer("hello there. how are you. ", skip_refine_text=True)
    assert default.spk_smp, "now the voice of all that follow"
    assert default.txt_smp == "hello there. "
    (before,) = Driver(engine).say(segment())
    Driver(engine).say(segment("one two", 4, voice="male2", sampling=Sampling(temperature=1.0)))
    (after,) = Driver(engine).say(segment())
    assert (before == after).all()


def test_a_row_has_its_own_length(engine: ChatTTSEngine, upstream: Any) -> None:
    hidden = [torch.randn(steps, 48, generator=torch.Generator().manual_seed(steps)) for steps in (100, 30)]
    alone = [upstream._decode_to_wavs([each.clone()], True)[0] for each in hidden]
    _, short = upstream._decode_to_wavs([each.clone() for each in hidden], True)
    assert len(short) == len(alone[0]), "as long as the longest"
    assert np.abs(short[whole_samples(30) :]).max() > 0.01, "with a tail of noise"
    assert np.abs(short[: whole_samples(30)] - alone[1]).max() > 0.01, "and another end"
    with torch.inference_mode():
        vocoder = engine._vocoder
        made = vocoder.run([VocoderWork(vocoder.begin(), each, last=True) for each in hidden])
    for ours, theirs in zip(made.rows(), alone, strict=True):
        assert len(ours) == len(theirs)
        assert np.abs(ours.numpy() - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_a_stream_computes_each_frame_once(
    engine: ChatTTSEngine, upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, decoded = 120, []
    asked = parameters(upstream, steps, temperature=1e-5)
    hook = upstream.decoder.register_forward_pre_hook(lambda module, args: decoded.append(args[0].shape[-1]))
    decoded_before = [sum(decoded) for _ in speak(upstream, ["hello you"], asked, stream=True)]
    hook.remove()
    assert decoded == [24, 48, 72, 96, 120, 120], "each prefix anew"
    assert decoded_before[0] == 24 + 48 + 72, "and no sample before the third"
    (result,) = upstream._infer_code(["hello you"], False, upstream.device, True, asked)
    hidden = result.hiddens[0]
    (whole,) = upstream._decode_to_wavs([hidden.clone()], True)
    assert len(whole) == whole_samples(steps)
    soon = replace(asked, pass_first_n_batches=0)
    streamed = np.concatenate([part[0] for part in speak(upstream, ["hello you"], soon, stream=True)])
    assert np.abs(streamed[:12_000] - whole[:12_000]).max() > 0.01, "if it starts sooner, there are joins"

    vocoder = engine._vocoder
    state, parts = vocoder.begin(), hidden.split(24)
    taken = noted(monkeypatch, Network, "__call__")
    made = [vocoder.run([VocoderWork(state, part, last=part is parts[-1])]).samples for part in parts]
    assert sum(taken) == steps
    assert np.abs(torch.cat(made).numpy() - whole).max() <= 1e-4 * np.abs(whole).max()


async def test_a_stream_of_many_parts_loses_nothing(engine: ChatTTSEngine, upstream: Any) -> None:
    steps, parts = 100, 5
    asked = parameters(upstream, steps, spk_smp=None)
    waves = list(speak(upstream, ["hello you"] * parts, asked, stream=True, split_text=True))
    last = sum(wave.shape[1] for wave in waves if len(wave) == 1)
    assert last <= whole_samples(steps) - 12_000, "half a second is not there"

    segments = [segment("hello you", index=index) for index in range(7)]
    runner = Runner(engine, Policy(max_delay=math.inf), outbox_seconds=60.0)
    runner.start()
    ends: list[SegmentEnded] = []
    heard = b""
    try:
        async with asyncio.timeout(PATIENCE), runner.speak(segments, max_rows=2, stream=True) as speaking:
            while not isinstance(event := await speaking.get(), RequestEnded):
                if isinstance(event, Audio):
                    heard += event.data
                else:
                    assert isinstance(event, SegmentEnded)
                    ends.append(event)
    finally:
        await runner.stop()
    lengths = [end.end_sample - end.start_sample for end in ends]
    assert len(lengths) == len(segments)
    assert all(length % STEP == STEP // 2 for length in lengths), "each part to its last sample"
    assert sum(lengths) == event.samples == len(heard) // 2


def test_silence_is_kept(tiny_checkpoint: Path, upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wave = np.sin(np.arange(whole_samples(4), dtype=np.float32))
    wave[500:900] = 1e-6
    with monkeypatch.context() as patched:
        patched.setattr(upstream, "_decode_to_wavs", lambda *_: wave[None])
        (theirs,) = speak(upstream, ["hello"], parameters(upstream, 4))
    assert len(theirs) <= len(wave) - 400, "a pause within the speech is gone"
    weights = load_weights(tiny_checkpoint, "cpu", "fp32", check_sums=False)
    silent = {name: torch.zeros_like(each) if "head.out" in name else each for name, each in weights.vocos.items()}
    vocoder = Vocoder(weights.decoder, silent)
    made = vocoder.run([VocoderWork(vocoder.begin(), torch.randn(4, 48), last=True)])
    assert made.int16.tolist() == [0] * whole_samples(4)


def test_a_cancel_is_of_one_request(engine: ChatTTSEngine, upstream: Any) -> None:
    upstream.interrupt()
    assert upstream.context.get(), "whoever is speaking"
    speak(upstream, ["no"], parameters(upstream, 2))
    assert not upstream.context.get(), "the next call has cleared it for those who should stop"
    (alone,) = Driver(engine).say(segment())
    driver = Driver(engine)
    stays, goes = driver.join(segment()), driver.join(segment(seed=2), 1)
    driver.run(Plan(joins=((stays, goes),), steps=5))
    driver.run(Plan(leaves=(goes.ref,), steps=5))
    done = driver.steps[goes.ref]
    driver.until_over(stays.ref, steps=5)
    driver.run(Plan(vocode=(Vocode(stays.ref, driver.steps[stays.ref]),)))
    assert driver.steps[goes.ref] == done
    assert len(driver.samples[stays.ref]) == 2 * len(alone)


def test_nothing_needs_vllm() -> None:
    import_chattts()
    with pytest.raises(ImportError):
        import ChatTTS.model.velocity  # noqa: F401
    for path in Path("service").rglob("*.py"):
        assert "vllm" not in path.read_text(), path
