"""Samples are those of upstream's Decoder and Vocos, however a row's steps come and whatever comes beside them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.upstream_vocoder import Tensors, Upstream, checkpoint, decibels
from service.engines.chattts.convolution import Depthwise
from service.engines.chattts.vocode import Vocoder, VocoderWork, to_int16

HIDDEN = 48
LOOKAHEAD = 52
LENGTHS = (1, 2, 3, 25, 51, 52, 53, 104, 105, 200)
EXACT = {torch.float32: -100.0, torch.float64: -250.0}
"""dB of the error that rounding may make: relative 1e-5 in fp32. Measured: -118 and -290."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Both vocoders on the same weights."""

    decoder: Tensors
    vocos: Tensors
    upstream: Upstream
    ours: Vocoder

    @classmethod
    def of(cls, decoder: Tensors, vocos: Tensors, dtype: torch.dtype) -> Pair:
        decoder, vocos = ({name: values.to(dtype) for name, values in each.items()} for each in (decoder, vocos))
        return cls(decoder, vocos, Upstream(decoder, vocos), Vocoder(decoder, vocos))

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder["coef"].dtype

    def hidden(self, steps: int, seed: int = 0) -> Tensor:
        return torch.randn(steps, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=self.dtype)

    def close(self, ours: Tensor, theirs: Tensor) -> bool:
        return ours.shape == theirs.shape and decibels(ours, theirs) < EXACT[self.dtype]


@pytest.fixture(scope="module", params=["plain fp32", "plain fp64", "stress fp64"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    weights, dtype = request.param.split()
    tensors = checkpoint(tmp_path_factory.mktemp("checkpoint"), stress=weights == "stress")
    return Pair.of(*tensors, torch.float32 if dtype == "fp32" else torch.float64)


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair.of(*checkpoint(tmp_path_factory.mktemp("stress"), stress=True), torch.float64)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair.of(*checkpoint(tmp_path_factory.mktemp("plain"), stress=False), torch.float32)


class Calls(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.frames = 0
        """Rows of all matrix products with weights."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            self.frames += len(args[-2])
        return func(*args, **(kwargs or {}))


def whole(vocoder: Vocoder, hidden: Tensor) -> Tensor:
    return vocoder.run([VocoderWork(vocoder.begin(), hidden, last=True)]).samples


def stream(vocoder: Vocoder, hidden: Tensor, chunks: Sequence[int]) -> Iterator[Tensor]:
    """The row's samples, pass by pass; the last chunk is the row's end."""
    state = vocoder.begin()
    for n, part in enumerate(hidden.split(list(chunks)), start=1):
        yield vocoder.run([VocoderWork(state, part, last=n == len(chunks))]).samples


@pytest.mark.parametrize("steps", LENGTHS)
def test_a_whole_utterance_is_upstreams(pair: Pair, steps: int) -> None:
    hidden = pair.hidden(steps)
    ours, theirs = whole(pair.ours, hidden), pair.upstream(hidden)
    assert ours.shape == (512 * steps - 256,)
    assert pair.close(ours, theirs)


def test_single_precision_is_near_even_where_every_tap_matters(stress: Pair) -> None:
    single = Pair.of(stress.decoder, stress.vocos, torch.float32)
    for steps in LENGTHS:
        hidden = single.hidden(steps)
        assert decibels(whole(single.ours, hidden), single.upstream(hidden)) < -80, steps


@pytest.mark.parametrize("chunk", [1, 5, 24, 60])
def test_a_stream_is_the_whole_utterance(pair: Pair, chunk: int) -> None:
    hidden = pair.hidden(125)
    chunks = [chunk] * (125 // chunk) + [125 % chunk]
    done, given = 0, 0
    pieces = []
    for size, piece in zip(chunks, stream(pair.ours, hidden, chunks), strict=True):
        done, given = done + size, given + len(piece)
        pieces.append(piece)
        assert given == (512 * max(0, done - LOOKAHEAD) if len(pieces) < len(chunks) else 512 * 125 - 256)
    assert pair.close(torch.cat(pieces), pair.upstream(hidden))


@dataclass(frozen=True, slots=True)
class Row:
    """When a row begins and how its steps come. The last chunk may be empty: then its end is told afterwards."""

    begins: int
    chunks: list[int]


rows = st.builds(
    Row, st.integers(0, 4), st.lists(st.sampled_from([0, 1, 2, 3, 7, 24, 52, 53, 80]), min_size=1, max_size=6)
)


@settings(max_examples=25, deadline=None)
@given(st.lists(rows, min_size=1, max_size=5))
def test_any_cut_of_any_rows_gives_the_same_samples(stress: Pair, rows: list[Row]) -> None:
    hidden = [stress.hidden(sum(row.chunks), seed) for seed, row in enumerate(rows)]
    left = [iter(steps.split(row.chunks)) for steps, row in zip(hidden, rows, strict=True)]
    states = [stress.ours.begin() for _ in rows]
    heard: list[list[Tensor]] = [[] for _ in rows]
    for tick in count():
        live = [n for n, row in enumerate(rows) if 0 <= tick - row.begins < len(row.chunks)]
        if not live and all(state.ended for state in states):
            break
        ends = [tick - rows[n].begins == len(rows[n].chunks) - 1 for n in live]
        work = [VocoderWork(states[n], next(left[n]), end) for n, end in zip(live, ends, strict=True)]
        for n, piece in zip(live, stress.ours.run(work).rows(), strict=True):
            heard[n].append(piece)
    for row, steps, pieces in zip(rows, hidden, heard, strict=True):
        done = 0
        for size, so_far in zip(row.chunks[:-1], range(1, len(row.chunks)), strict=True):
            done += size
            assert sum(map(len, pieces[:so_far])) == 512 * max(0, done - LOOKAHEAD)
        ours = torch.cat(pieces)
        assert stress.close(ours, stress.upstream(steps)) if len(steps) else len(ours) == 0


def test_a_row_is_the_same_alone_and_beside_any_others(pair: Pair) -> None:
    lengths = [1, 200, 52, 53, 90]
    hidden = [pair.hidden(steps, seed) for seed, steps in enumerate(lengths)]
    alone = [whole(pair.ours, each) for each in hidden]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [1]):
        work = [VocoderWork(pair.ours.begin(), hidden[n], last=True) for n in order]
        together = pair.ours.run(work).rows()
        assert all(pair.close(ours, alone[n]) for ours, n in zip(together, order, strict=True))


def test_rows_at_any_place_share_one_pass(plain: Pair) -> None:
    def calls(rows: int) -> list[str]:
        states = [plain.ours.begin() for _ in range(rows)]
        for n, state in enumerate(states[1:]):
            plain.ours.run([VocoderWork(state, plain.hidden(30 * n))])
        work = [VocoderWork(state, plain.hidden(24 + n), last=n % 3 == 2) for n, state in enumerate(states)]
        seen = Calls()
        with seen:
            plain.ours.run(work)
        return seen.names

    assert calls(8) == calls(1)


def test_each_frame_is_computed_once(plain: Pair) -> None:
    hidden = plain.hidden(150)
    with Calls() as once:
        whole(plain.ours, hidden)
    with Calls() as cut:
        for _ in stream(plain.ours, hidden, [7] * 21 + [3]):
            pass
    assert cut.frames == once.frames


def test_nothing_is_read_back_from_the_device(plain: Pair) -> None:
    """A meta device has no values to read: what asks for one fails there, as it would wait for a GPU."""
    decoder, vocos = ({name: each.to("meta") for name, each in part.items()} for part in (plain.decoder, plain.vocos))
    ours = Vocoder(decoder, vocos)
    states = [ours.begin() for _ in range(3)]
    hidden = torch.empty(60, HIDDEN, device="meta")
    ours.run([VocoderWork(state, hidden) for state in states[:2]])
    made = ours.run([VocoderWork(state, hidden, last=n == 1) for n, state in enumerate(states)])
    assert made.lengths == [60 * 512, 112 * 512 - 256, 8 * 512]
    assert made.samples.device.type == "meta"
    assert made.int16.shape == (sum(made.lengths),)


def test_the_context_is_52_steps_and_only_stress_weights_show_it(stress: Pair) -> None:
    hidden = stress.hidden(160)
    theirs = stress.upstream(hidden)

    def error(pair: Pair, lookahead: int, theirs: Tensor) -> float:
        vocoder = Vocoder(pair.decoder, pair.vocos, lookahead)
        return decibels(torch.cat(list(stream(vocoder, hidden.to(pair.dtype), [80, 24, 24, 32]))), theirs)

    assert error(stress, 50, theirs) > -100
    assert error(stress, 51, theirs) > -100
    assert error(stress, 52, theirs) < -250
    # As upstream initialises them, layer scales are 1e-6: each block is nearly the identity, and half is as good.
    fresh = {name: torch.full_like(each, 1e-6) if _is_scale(name) else each for name, each in stress.decoder.items()}
    scales = {name: torch.full_like(each, 1 / 8) if _is_scale(name) else each for name, each in stress.vocos.items()}
    nearly = Pair.of(fresh, scales, torch.float32)
    assert error(nearly, 26, nearly.upstream(hidden.float())) < EXACT[torch.float32]


def _is_scale(name: str) -> bool:
    return name.endswith(".gamma") or (name.endswith(".weight") and name.split(".")[-2].isdigit() and "block" in name)


@pytest.mark.parametrize("lookahead", [1, 8, 51])
def test_a_shorter_lookahead_hears_the_row_end_with_the_pass(stress: Pair, lookahead: int) -> None:
    vocoder = Vocoder(stress.decoder, stress.vocos, lookahead)
    hidden = stress.hidden(150)
    chunks, done, given = [5, 24, 24, 70, 1, 26], 0, 0
    for size, piece in zip(chunks, stream(vocoder, hidden, chunks), strict=True):
        done += size
        stop = 512 * 150 - 256 if done == 150 else 512 * max(0, done - lookahead)
        assert len(piece) == stop - given
        if len(piece):
            assert stress.close(piece, stress.upstream(hidden[:done])[given:stop])
        given = stop


def test_an_ended_row_leaves_nothing(plain: Pair) -> None:
    state = plain.ours.begin()
    assert state.histories is not None
    kept = weakref.ref(state.histories)
    plain.ours.run([VocoderWork(state, plain.hidden(60))])
    assert not state.ended
    assert kept() is not None
    made = plain.ours.run([VocoderWork(state, plain.hidden(0), last=True)])
    assert state.ended
    assert made.lengths == [512 * 52 - 256]
    assert kept() is None
    with pytest.raises(ValueError, match="ended before"):
        plain.ours.run([VocoderWork(state, plain.hidden(1))])


def test_a_row_comes_once_in_a_pass(plain: Pair) -> None:
    state = plain.ours.begin()
    with pytest.raises(ValueError, match="comes twice"):
        plain.ours.run([VocoderWork(state, plain.hidden(1)), VocoderWork(state, plain.hidden(1))])


def test_a_pass_that_fails_changes_nothing(plain: Pair) -> None:
    hidden = plain.hidden(120)
    state = plain.ours.begin()
    first = plain.ours.run([VocoderWork(state, hidden[:70])]).samples
    with pytest.raises(RuntimeError):
        plain.ours.run([VocoderWork(state, hidden[70:]), VocoderWork(plain.ours.begin(), torch.zeros(3, HIDDEN + 2))])
    rest = plain.ours.run([VocoderWork(state, hidden[70:], last=True)]).samples
    assert plain.close(torch.cat((first, rest)), plain.upstream(hidden))


def test_no_work_is_no_samples(plain: Pair) -> None:
    made = plain.ours.run([])
    assert made.lengths == []
    assert len(made.samples) == 0


def test_hidden_states_may_be_in_a_smaller_type(plain: Pair) -> None:
    hidden = plain.hidden(60).bfloat16()
    made = whole(plain.ours, hidden)
    assert made.dtype == torch.float32
    assert plain.close(made, plain.upstream(hidden.float()))


@pytest.mark.parametrize("lookahead", [0, 53])
def test_the_lookahead_is_bounded(plain: Pair, lookahead: int) -> None:
    with pytest.raises(ValueError, match="1 to 52 steps"):
        Vocoder(plain.decoder, plain.vocos, lookahead)


def test_both_ways_of_a_depthwise_convolution_agree() -> None:
    packed, weight, bias = torch.randn(70, 24), torch.randn(24, 1, 7), torch.randn(24)
    for dilation in (1, 2):
        convolution = Depthwise.of(weight, bias, dilation)
        ours = convolution.by_shifts(packed)
        assert ours.shape == (70 - 6 * dilation, 24)
        torch.testing.assert_close(ours, convolution.by_conv1d(packed))


def test_samples_are_rounded_and_clipped() -> None:
    floats = torch.tensor([0.0, 1.0, -1.0, 0.5 / 32767, 0.6 / 32767, -0.6 / 32767, 1.5, -1.5, float("inf")])
    whole = floats.clone()
    assert to_int16(floats).tolist() == [0, 32767, -32767, 0, 1, -1, 32767, -32768, 32767]
    assert to_int16(floats).dtype == torch.int16
    assert torch.equal(floats, whole), "they stay"
