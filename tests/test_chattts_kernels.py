"""The Triton kernels against the plain code, and the noise of draws bit for bit.

Without a GPU, Triton's interpreter runs them, and the compiler is tried apart: `compiled_kernels.py`.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from service.engines.chattts import sample
from service.engines.chattts.operations import Rotary
from service.engines.chattts.sample import NO_TOKEN, WINDOW, Sampling
from tests.test_chattts_sample import sampling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with pytest.MonkeyPatch.context() as patch:
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")  # read where functions are decorated, Triton's own among them
    triton = pytest.importorskip("triton")

    from service.engines.chattts import draw_kernel, kernels
    from service.engines.chattts.decode import Decoder, Drawing, Kind, Row
    from service.engines.chattts.load import load_weights
    from service.engines.chattts.prompt import Prompt
    from tests import kernel_parts

GARBAGE = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
BLOCK = kernels._BLOCK


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton imports as late as at a launch asks again."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def _quick_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy sorts for the interpreter, which takes a second for each row otherwise."""

    def sort(x: Any) -> Any:
        ordered = x + 0
        ordered.handle.data = np.sort(x.handle.data)
        return ordered

    if DEVICE == "cpu":
        monkeypatch.setattr(triton.language, "sort", sort)


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(ours: Tensor, exact: Tensor) -> bool:
    """Rounded once to its type, or in fp32 a few times."""
    assert ours.shape == exact.shape
    tolerance = max(torch.finfo(ours.dtype).eps, 4e-6)
    return torch.allclose(ours.float(), exact.float(), rtol=tolerance, atol=4e-6)


def strided(tensor: Tensor) -> Tensor:
    """The same values, with something between the rows."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 16), math.nan, dtype=tensor.dtype, device=tensor.device)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


# -- norm and gate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 768), (3, 48), (5, 7)])
def test_norms(dtype: torch.dtype, rows: int, size: int) -> None:
    x, delta = strided(noise(rows, size, dtype=dtype)), noise(rows, size, dtype=dtype, seed=1)
    weight = noise(size, dtype=dtype, seed=2)
    # Where `gpt.py` rounds to nearest and a GPU does too, the interpreter cuts off bits of bf16.
    rounding = 4 * torch.finfo(dtype).eps
    normed = kernels.norm(x, weight, EPS)
    assert torch.allclose(normed, rms_norm(x, weight.shape, weight, EPS), rtol=rounding, atol=1e-6)
    for left, right in ((x, delta), (delta, x)):
        total, normed = kernels.add_norm(left, right, weight, EPS)
        assert close(total, x.float() + delta.float())
        assert torch.allclose(normed, rms_norm(total, weight.shape, weight, EPS), rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(2, 3072), (3, 1), (2, 1025)])
def test_gate(dtype: torch.dtype, rows: int, size: int) -> None:
    gate_up = strided(noise(rows, 2 * size, dtype=dtype) * 8)
    first, second = gate_up.float().chunk(2, dim=-1)
    assert close(kernels.gate(gate_up), silu(first) * second)


def test_a_row_that_is_not_a_number_stays_alone() -> None:
    x, weight = noise(3, 40), noise(40, seed=1)
    spoiled = x.clone()
    spoiled[1] = math.nan
    spoiled[1, 3] = math.inf
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: kernels.norm(x, weight, EPS),
        lambda x: kernels.add_norm(x, x, weight, EPS)[1],
        kernels.gate,
    ]
    for function in functions:
        assert torch.equal(function(spoiled)[::2], function(x)[::2])


# -- rotation and the cache -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "heads", "size"), [(3, 12, 64), (1, 3, 8), (2, 5, 10), (2, 1, 2)])
def test_rotation(dtype: torch.dtype, rows: int, heads: int, size: int) -> None:
    length, slots = 9, rows + 2
    qkv = strided(noise(rows, 3 * heads * size, dtype=dtype))
    angles = noise(length, size // 2, seed=1) * 3
    cos = torch.cat([angles.cos()] * 2, dim=-1).to(dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).to(dtype)
    positions = torch.tensor([length - 1, 0, 4][:rows], device=DEVICE)
    cache = noise(2, slots, heads, length, size, dtype=dtype, seed=2)
    keys, values = cache[0].clone(), strided(cache[1])
    turned = kernels.rotate_and_store(qkv, cos, sin, positions, keys, values)

    turn = (cos[positions].float()[:, None], sin[positions].float()[:, None])
    q, k, v = qkv.view(rows, 3, heads, size).float().unbind(1) if qkv.is_contiguous() else _parts(qkv, heads)
    assert turned.is_contiguous()
    assert close(turned, Rotary(*turn).turned(q))
    places = torch.arange(rows, device=DEVICE)
    assert close(keys[places, :, positions], Rotary(*turn).turned(k))
    assert torch.equal(values[places, :, positions].float(), v)
    for written, before in zip((keys, values), cache, strict=True):
        rest = torch.ones(slots, length, dtype=torch.bool, device=DEVICE)
        rest[places, positions] = False
        assert torch.equal(written.transpose(1, 2)[rest], before.transpose(1, 2)[rest]), "and nothing else"


def _parts(qkv: Tensor, heads: int) -> Sequence[Tensor]:
    return qkv.contiguous().view(len(qkv), 3, heads, -1).float().unbind(1)


# -- attention --------------------------------------------------------------------------------------------------------


def attended(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """In fp64, row by row."""
    rows = []
    for row, position in enumerate(positions.tolist()):
        key, value = keys[row, :, : position + 1].double(), values[row, :, : position + 1].double()
        scores = (key @ q[row].double()[..., None])[..., 0] / math.sqrt(q.shape[-1])
        rows.append((scores.softmax(-1)[:, None] @ value).flatten())
    return torch.stack(rows)


def cached(
    positions: Sequence[int], heads: int, size: int, length: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A query for each row, and a cache with nothing but garbage beyond their lengths."""
    rows = len(positions)
    q, cache = noise(rows, heads, size, dtype=dtype) * 2, noise(2, rows + 1, heads, length, size, dtype=dtype, seed=1)
    cache[:, rows:] = math.nan
    for row, position in enumerate(positions):
        cache[:, row, :, position + 1 :] = math.nan if row % 2 else math.inf
    return q, cache[0], strided(cache[1]), torch.tensor(positions, device=DEVICE)


BORDERS = (0, 1, BLOCK - 2, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 4 * BLOCK - 1, 4 * BLOCK, 5 * BLOCK - 1)


@pytest.mark.parametrize("splits", [1, 2, 4, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_at_the_borders_of_blocks_and_parts(dtype: torch.dtype, splits: int) -> None:
    q, keys, values, positions = cached(BORDERS, 1, 16, 5 * BLOCK, dtype)
    ours = kernels.attend(q, keys, values, positions, splits)
    assert ours.dtype is dtype
    assert close(ours, attended(q, keys, values, positions))


@settings(max_examples=12, deadline=None)
@given(
    positions=st.lists(st.integers(0, 3 * BLOCK - 1), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    size=st.sampled_from([2, 8, 10, 16, 64]),
    splits=st.integers(1, 6),
)
@example(positions=[2 * BLOCK], heads=1, size=8, splits=None)
def test_attention_of_any_shape(positions: list[int], heads: int, size: int, splits: int | None) -> None:
    given = cached(positions, heads, size, 3 * BLOCK)
    assert close(kernels.attend(*given, splits), attended(*given))


def test_attention_of_the_real_models_shape() -> None:
    given = cached([1500, 300], 12, 64, 4096, torch.bfloat16)
    assert kernels.splits_of(2, 12) == 32
    assert close(kernels.attend(*given, splits=4), attended(*given))


def test_scores_far_apart_are_weighed() -> None:
    q, *others = cached([3 * BLOCK - 1] * 2, 2, 16, 3 * BLOCK)
    given = (q * 300, others[0], others[1], others[2])
    for splits in (1, 3):
        assert torch.allclose(kernels.attend(*given, splits).double(), attended(*given), rtol=1e-3, atol=1e-3)


@GARBAGE
@pytest.mark.parametrize("splits", [1, 4])
def test_garbage_in_a_row_stays_there(splits: int) -> None:
    q, keys, values, positions = cached([BLOCK, 2 * BLOCK, BLOCK], 2, 8, 3 * BLOCK)
    clean = kernels.attend(q, keys, values, positions, splits)
    for garbage in (math.nan, math.inf, -math.inf):
        keys[1, :, 3:70], values[1, :, 5] = garbage, garbage
        assert torch.equal(kernels.attend(q, keys, values, positions, splits)[::2], clean[::2])


def test_a_row_is_the_same_bit_for_bit_in_any_company() -> None:
    q, keys, values, positions = cached([200, 3, 130], 2, 16, 4 * BLOCK)
    together = kernels.attend(q, keys, values, positions, 4)
    for row in range(3):
        alone = kernels.attend(q[row : row + 1], keys[row:], values[row:], positions[row : row + 1], 4)
        assert torch.equal(alone[0], together[row])


def test_splits_are_fewer_the_more_rows_there_are() -> None:
    splits = [kernels.splits_of(rows, 12) for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    assert splits == [32, 32, 32, 16, 8, 4, 2, 1, 1]
    assert kernels.splits_of(5, 3) == 32


def test_rows_must_be_contiguous() -> None:
    x = noise(6, 4)
    for call in (
        lambda: kernels.norm(x.t(), x[0], EPS),
        lambda: kernels.add_norm(x, x, x[:4, 0], EPS),
        lambda: kernels.gate(x.t()),
        lambda: kernels.attend(x.t()[None], x[None, None], x[None, None], torch.zeros(1, dtype=torch.int64)),
        lambda: kernels.rotate_and_store(x.t(), x, x, x, x[None, None], x[None, None]),
    ):
        with pytest.raises(ValueError, match="contiguous"):
            call()


# -- drawing ----------------------------------------------------------------------------------------------------------


def keep_top(scores: Tensor, tail: Tensor, top_k: Tensor) -> Tensor:
    """[R, V]."""
    rows, tokens = scores.shape
    out = torch.empty_like(scores)
    lanes = triton.next_power_of_2(tokens)
    kernel_parts.top_kernel[(rows,)](scores.contiguous(), tail, top_k, out, tokens=tokens, least_kept=3, lanes=lanes)
    return out


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 4, st.integers(0, 9)), min_size=1, max_size=8))
def test_the_random_integers_are_the_same_bit_for_bit(words: list[tuple[int, ...]]) -> None:
    table = torch.tensor(words, device=DEVICE)
    ours = torch.empty(len(words), 64, dtype=torch.int64, device=DEVICE)
    kernel_parts.bits_kernel[(len(words),)](table, ours, tokens=64)
    state = torch.zeros(len(words), dtype=torch.int64, device=DEVICE)
    for column in table.unbind(-1):
        state = sample.absorb(state, column)
    assert torch.equal(ours, sample.random_bits(state, 64))


def given_rows(rows: int, codebooks: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Sampling]:
    """Logits, recent tokens and steps, and parameters of all kinds, whose tensors are columns of two tables."""
    generator = torch.Generator().manual_seed(seed)

    def some(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]

    def any_of(least: int, most: int) -> Tensor:
        return torch.randint(least, most, (rows,), generator=generator)

    floats = torch.stack([some(0.3, 0.8, 1.7, 1e-5), 1 - some(0.01, 0.7, 0.9, 1.0), some(1.0, 1.05, 2.0)], dim=1)
    seeds = any_of(-(2**63), 2**63 - 1)
    integers = torch.stack([any_of(1, tokens), any_of(0, 20), seeds, any_of(0, 5), any_of(0, 3)], dim=1)
    temperature, tail, penalty = floats.to(DEVICE).unbind(1)
    top_k, min_steps, seeds, segment, attempt = integers.to(DEVICE).unbind(1)
    recent = torch.randint(NO_TOKEN, min(tokens, 30), (rows, codebooks, WINDOW), generator=generator).to(DEVICE)
    logits = noise(rows, codebooks, tokens, seed=seed) * 3
    return (
        logits,
        recent,
        any_of(0, 40).to(DEVICE),
        Sampling(temperature, tail, top_k, penalty, min_steps, seeds, segment, attempt),
    )


def reference(
    logits: Tensor, recent: Tensor, step: Tensor, given: Sampling, end: int, first_codebook: int
) -> tuple[Tensor, Tensor]:
    """What the plain code draws, [R, C], and where a rounding could not change it."""
    scores = sample.process(logits, recent, step, given, end)
    states = sample._states(scores, step, given, first_codebook)
    best = (scores + sample.gumbel(states, logits.shape[-1])).topk(2).values
    before = sample._penalise(logits / given.temperature[:, None, None], recent, given.penalty)
    below = before.sort(dim=-1).values.softmax(-1).cumsum(-1)
    sure = (below - given.tail[:, None, None]).abs().amin(-1) > 3e-6
    sure |= given.tail[:, None] == 0
    return sample.draw(scores, step, given, first_codebook), sure & (
        best[..., 0] - best[..., 1] > 1e-5 * best[..., 0].abs()
    )


@pytest.mark.usefixtures("_quick_sort")
@pytest.mark.parametrize(("rows", "codebooks", "tokens"), [(20, 4, 626), (30, 4, 61), (20, 1, 3), (10, 2, 4)])
def test_draws_are_the_plain_codes(rows: int, codebooks: int, tokens: int) -> None:
    logits, recent, step, given = given_rows(rows, codebooks, tokens)
    recent.clamp_(max=tokens - 1)
    wide = noise(rows, codebooks + 1, tokens)
    wide[:, :codebooks] = logits
    ours = draw_kernel.draw(wide[:, :codebooks], recent, step, given, tokens - 1, 2)
    theirs, sure = reference(logits, recent, step, given, tokens - 1, 2)
    assert torch.equal(ours[sure], theirs[sure])
    assert sure.float().mean() > 0.95


@pytest.mark.usefixtures("_quick_sort")
def test_what_is_kept_is_what_the_plain_code_keeps() -> None:
    _check_kept(noise(100, 626) * 3)


def test_what_is_kept_is_found_by_tritons_own_sort() -> None:
    _check_kept(noise(20, 29) * 3)


def _check_kept(scores: Tensor) -> None:
    rows = len(scores)
    tail = torch.tensor([0.0, 0.1, 0.3, 0.99], device=DEVICE).repeat(rows // 4)
    top_k = torch.tensor([1, 3, 20, scores.shape[1], 1000], device=DEVICE).repeat(rows // 5)
    theirs = sample._keep_top(scores[:, None], tail, top_k)[:, 0]
    assert torch.equal(keep_top(scores, tail, top_k), theirs)


TIES = {
    "all equal": torch.zeros(50),
    "two levels": torch.cat([torch.zeros(40), torch.ones(10)]),
    "zeros of both signs": torch.tensor([0.0, -0.0] * 25),
    "many cannot be drawn": torch.cat([torch.full((45,), -math.inf), torch.arange(5.0)]),
}


@pytest.mark.usefixtures("_quick_sort")
@pytest.mark.parametrize("name", TIES)
@pytest.mark.parametrize("top_k", [1, 3, 20, 50])
def test_of_ties_as_many_are_kept_and_top_k_keeps_all(name: str, top_k: int) -> None:
    """For top-P, which ones is left to the sort."""
    tails = torch.tensor([0.0, 0.055, 0.33, 0.99], device=DEVICE)
    scores, counts = TIES[name].to(DEVICE).repeat(4, 1), torch.full((4,), top_k, device=DEVICE)
    ours, theirs = keep_top(scores, tails, counts), sample._keep_top(scores[:, None], tails, counts)[:, 0]
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours.sort(dim=-1).values, theirs.sort(dim=-1).values)
    possible = (scores > -math.inf).sum(-1)
    assert ((ours > -math.inf).sum(-1) >= possible.clamp(max=3)).all()


@pytest.mark.usefixtures("_quick_sort")
def test_three_tokens_can_be_drawn_at_least_and_the_end_not_too_early() -> None:
    rows, tokens = 20, 32
    logits = torch.arange(tokens, device=DEVICE).expand(rows, 1, tokens).float() / 10
    recent = torch.full((rows, 1, WINDOW), NO_TOKEN, device=DEVICE)
    given = on_device(sampling(rows, temperature=1.0, top_p=0.01, top_k=1, min_steps=5, seed=list(range(rows))))
    for step, kept in ((4, {29, 30}), (5, {29, 30, 31})):
        steps = torch.full((rows,), step, device=DEVICE)
        assert set(draw_kernel.draw(logits, recent, steps, given, 31).flatten().tolist()) == kept


def on_device(given: Sampling) -> Sampling:
    return Sampling(*(getattr(given, name).to(DEVICE) for name in Sampling.__slots__))


@pytest.mark.parametrize("times", [0, 1, 2, 5, 15, 16])
def test_the_penalty_counts_how_often(times: int) -> None:
    """A token's logit makes up for its penalty but for a thousandth, at a temperature at which that decides."""
    recent = torch.tensor([[[7] * times + [NO_TOKEN] * (WINDOW - times)]], device=DEVICE)
    given = on_device(sampling(1, temperature=1e-7, top_p=1.0, top_k=8, penalty=1.5))
    for sign in (1, -1):
        for nudge in (0.999, 1.001):
            logits = torch.full((1, 1, 8), -1e5, device=DEVICE)
            logits[..., 3], logits[..., 7] = sign, sign * 1.5 ** (sign * times) * nudge
            drawn = draw_kernel.draw(logits, recent, torch.zeros(1, dtype=torch.int64, device=DEVICE), given, 0)
            assert drawn.item() == (7 if (nudge > 1) == (sign > 0) else 3)


@GARBAGE
@pytest.mark.usefixtures("_quick_sort")
def test_logits_that_are_not_numbers_give_some_token_and_harm_no_other_row() -> None:
    logits, recent, step, given = given_rows(4, 2, 13)
    clean = draw_kernel.draw(logits, recent, step, given, 12)
    for garbage in (math.nan, math.inf, -math.inf):
        logits[1], logits[2, 1, 5] = garbage, garbage
        drawn = draw_kernel.draw(logits, recent, step, given, 12)
        assert torch.equal(drawn[::3], clean[::3])
        assert drawn.min() >= 0
        assert drawn.max() < 13


def test_what_draw_refuses() -> None:
    logits, recent, step, given = given_rows(2, 2, 5)
    for shape in ((2, 2, 2), (2, 2, draw_kernel.MOST_TOKENS + 1)):
        with pytest.raises(ValueError, match="tokens are not in"):
            draw_kernel.draw(torch.zeros(shape), recent, step, given, 1)
    with pytest.raises(ValueError, match="contiguous"):
        draw_kernel.draw(logits.transpose(1, 2), recent, step, given, 1)


# -- the compiler -----------------------------------------------------------------------------------------------------


def test_all_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """In a process of its own: in this one, functions may be the interpreter's."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.compiled_kernels"]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert len(set(printed.split())) == 7


# -- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_quick_sort")
@GARBAGE
def test_rows_are_decoded_as_without_kernels(tiny_checkpoint: Path) -> None:
    """Rows of different lengths, one that joins later, and a text row, whose vocabulary is too large for the kernel."""
    weights = load_weights(tiny_checkpoint, DEVICE, "fp32", check_sums=False)  # type: ignore[arg-type]

    def decoded(*, kernels: bool) -> list[Row]:
        def row(number: int, kind: Kind = Kind.SPEECH) -> Row:
            prompt = Prompt(list(range(100, 105 + 4 * number)))
            return Row(prompt, drawing=Drawing(temperature=0.8, seed=number, min_steps=3, max_steps=3), kind=kind)

        rows = [row(3), row(1, Kind.TEXT), row(2)]
        decoder = Decoder(weights, 4, 64, 7, kernels=kernels)
        decoder.advance([rows[:2]], 1)
        decoder.advance([rows[2:]], 2)
        return rows

    with torch.inference_mode():
        for row, other in zip(decoded(kernels=True), decoded(kernels=False), strict=True):
            assert (row.tokens == other.tokens).all()
            assert torch.allclose(row.hidden(0, 3), other.hidden(0, 3), rtol=0, atol=1e-4)
