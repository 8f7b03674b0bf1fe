"""All that lies between logits and tokens, in one kernel: what `process` and `draw` of `sample.py` do on any device.

A row and codebook is one program's work, a token of the vocabulary a lane's. Nothing is scattered back from the sorted
order: the sort's keys hold a score and its token, so that they differ, and where top-P cuts is one key, with which each
lane compares its own.

What is the same as in `sample.py`, and what need not be:

- The random integers are, bit for bit.
- Noise comes of them by logarithms in fp64, rounded to fp32, so that devices hardly ever differ.
- Sums of probabilities are rounded in another order. A row whose sum lies within a rounding of its top-P may keep a
  token more or less.
- Of equal scores that top-P's cut runs between, the higher tokens are kept here; torch's sort promises nothing. Of
  those that top-K's runs between, all are kept, as there.

Importing it imports Triton: see `kernels.py`, which also says how it can be captured.

In shapes, R are rows, C codebooks, V tokens and W the penalty's window.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.engines.chattts.sample import LEAST_KEPT, WINDOW, Sampling

MOST_TOKENS = 4096
"""What one program can sort."""

# As in `sample.py`.
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_FACTOR_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_FACTOR_2 = tl.constexpr(0x94D049BB133111EB)
_DROPPED_BITS = tl.constexpr(64 - 52)
_RANDOM_SCALE = tl.constexpr(2.0**-52)
_LEAST = tl.constexpr(-(1 << 63))
_MOST = tl.constexpr((1 << 63) - 1)
_LOW_31 = tl.constexpr((1 << 31) - 1)


def draw(logits: Tensor, recent: Tensor, step: Tensor, sampling: Sampling, end: int, first_codebook: int = 0) -> Tensor:
    """Draws a token for each row and codebook.

    Args:
        logits: [R, C, V], fp32.
        recent: [R, C, W], int64: each codebook's last tokens, `NO_TOKEN` where there is none.
        step: [R]: the step to draw for.
        sampling: of the R rows.
        end: the token that ends a row.
        first_codebook: the number of the first codebook.

    Returns:
        [R, C], int64. Of logits that are not numbers, any of the V tokens.

    Raises:
        ValueError: a row of logits or of recent tokens is not contiguous, or V is not in 3 to `MOST_TOKENS`.
    """
    rows, codebooks, tokens = logits.shape
    if logits.stride(-1) != 1 or recent.stride(-1) != 1:
        raise ValueError("the last dimension must be contiguous")
    if not LEAST_KEPT <= tokens <= MOST_TOKENS:
        raise ValueError(f"{tokens} tokens are not in {LEAST_KEPT} to {MOST_TOKENS}")
    drawn = torch.empty(rows, codebooks, dtype=torch.int64, device=logits.device)
    fields = [getattr(sampling, name) for name in Sampling.__slots__]
    _draw_kernel[(rows, codebooks)](
        logits,
        recent,
        step,
        *fields,
        drawn,
        *logits.stride()[:2],
        *recent.stride()[:2],
        step.stride(0),
        *(field.stride(0) for field in fields),
        end,
        first_codebook,
        codebooks=codebooks,
        tokens=tokens,
        window=WINDOW,
        least_kept=LEAST_KEPT,
        lanes=triton.next_power_of_2(tokens),
    )
    return drawn


@triton.jit
def _mix(value):
    """SplitMix64's finaliser, on uint64."""
    value = (value ^ (value >> 30)) * _FACTOR_1
    value = (value ^ (value >> 27)) * _FACTOR_2
    return value ^ (value >> 31)


@triton.jit
def _random_bits(seed, segment, attempt, step, codebook, token):
    """All are int64. See `random_bits` and `absorb` in `sample.py`: there the state is 0 at first."""
    state = _mix(seed.to(tl.uint64, bitcast=True) ^ _GAMMA)
    state = _mix((state + _GAMMA) ^ segment.to(tl.uint64, bitcast=True))
    state = _mix((state + _GAMMA) ^ attempt.to(tl.uint64, bitcast=True))
    state = _mix((state + _GAMMA) ^ step.to(tl.uint64, bitcast=True))
    state = _mix((state + _GAMMA) ^ codebook.to(tl.uint64, bitcast=True))
    counter = (token + 1).to(tl.uint64, bitcast=True) * _GAMMA
    return (_mix(state + counter) >> _DROPPED_BITS).to(tl.int64, bitcast=True)


@triton.jit
def _gumbel(bits):
    uniform = (bits.to(tl.float64) + 0.5) * _RANDOM_SCALE
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def _penalised(score, recent, token, penalty, window: tl.constexpr):
    """By the penalty to the power of how often each token is among the recent ones, in fp64 and then rounded."""
    count = tl.zeros_like(token)
    for place in tl.static_range(window):
        count += (token == tl.load(recent + place)).to(count.dtype)
    power = penalty.to(tl.float64)
    factor = tl.where((count & 1) != 0, power, 1.0)
    for bit in tl.static_range(1, 5):
        power = power * power
        factor = tl.where((count & (1 << bit)) != 0, factor * power, factor)
    factor = factor.to(tl.float32)
    return tl.where(score < 0, score * factor, tl.div_rn(score, factor))


@triton.jit
def _keys(score, token, real):
    """Integers in the order of scores, and of tokens where these are equal. Lanes beyond the vocabulary come first."""
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & _LOW_31)
    return tl.where(real, (ordered.to(tl.int64) << 32) | token, _LEAST)


@triton.jit
def _scores(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & _LOW_31)).to(tl.float32, bitcast=True)


@triton.jit
def _keep_top(score, token, tail, top_k, tokens: tl.constexpr, least_kept: tl.constexpr, lanes: tl.constexpr):
    """Scores, of which those that top-P or top-K cuts are -inf. In the sorted order, the last ones are kept."""
    real = token < tokens
    key = _keys(score, token, real)
    ordered_key = tl.sort(key)
    place = tl.arange(0, lanes)
    ordered = tl.where(place >= lanes - tokens, _scores(ordered_key), float("-inf"))
    weight = tl.exp(ordered - tl.max(ordered, axis=0))
    below = tl.cumsum(weight / tl.sum(weight, axis=0), axis=0)
    cut = (below <= tail) & (place < lanes - least_kept)
    first_key = tl.min(tl.where(cut, _MOST, ordered_key), axis=0)
    kept = tl.minimum(tl.maximum(top_k, least_kept), tokens)
    kth = tl.sum(tl.where(place == lanes - kept, ordered, 0.0), axis=0)
    return tl.where((key < first_key) | (score < kth) | (token >= tokens), float("-inf"), score)


@triton.jit(
    do_not_specialize=[
        "logits_row",
        "logits_codebook",
        "recent_row",
        "recent_codebook",
        "step_row",
        "temperature_row",
        "tail_row",
        "top_k_row",
        "penalty_row",
        "min_steps_row",
        "seed_row",
        "segment_row",
        "attempt_row",
        "end",
        "first_codebook",
    ]
)
def _draw_kernel(
    logits,
    recent,
    step,
    temperature,
    tail,
    top_k,
    penalty,
    min_steps,
    seed,
    segment,
    attempt,
    drawn,
    logits_row,
    logits_codebook,
    recent_row,
    recent_codebook,
    step_row,
    temperature_row,
    tail_row,
    top_k_row,
    penalty_row,
    min_steps_row,
    seed_row,
    segment_row,
    attempt_row,
    end,
    first_codebook,
    codebooks: tl.constexpr,
    tokens: tl.constexpr,
    window: tl.constexpr,
    least_kept: tl.constexpr,
    lanes: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    codebook = tl.program_id(1).to(tl.int64)
    token = tl.arange(0, lanes).to(tl.int64)
    source = logits + row * logits_row + codebook * logits_codebook
    score = tl.load(source + token, mask=token < tokens, other=0.0)
    score = tl.div_rn(score, tl.load(temperature + row * temperature_row))
    window_start = recent + row * recent_row + codebook * recent_codebook
    score = _penalised(score, window_start, token, tl.load(penalty + row * penalty_row), window)
    top = tl.load(top_k + row * top_k_row)
    score = _keep_top(score, token, tl.load(tail + row * tail_row), top, tokens, least_kept, lanes)

    now = tl.load(step + row * step_row)
    too_early = now < tl.load(min_steps + row * min_steps_row)
    score = tl.where((token == end) & too_early, float("-inf"), score)
    bits = _random_bits(
        tl.load(seed + row * seed_row),
        tl.load(segment + row * segment_row),
        tl.load(attempt + row * attempt_row),
        now,
        first_codebook + codebook,
        token,
    )
    best = tl.argmax(score + _gumbel(bits), axis=0)
    tl.store(drawn + row * codebooks + codebook, tl.minimum(best, tokens - 1).to(tl.int64))
