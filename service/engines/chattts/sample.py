"""Draws tokens: logits are processed as upstream does it, and the noise belongs to the row.

The order is upstream's (`ChatTTS/model/gpt.py`, `generate`, and `model/processors.py`): temperature, repetition
penalty, top-P, top-K, end token. Where upstream takes one set of parameters for a whole batch, here every row has its
own, and all rows and codebooks go through in one pass with one sort.

Noise is a pure function of (seed, segment, attempt, step, codebook, token). So what a row draws depends neither on its
neighbours nor on its place in the batch, and its integers are the same on every device.

In shapes, R are rows, C codebooks, V tokens and W the penalty's window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

WINDOW = 16
"""Tokens back to which a repetition is penalised."""
LEAST_KEPT = 3
"""Tokens that top-P and top-K each leave at least."""
NO_TOKEN = -1
"""In the window: nothing was drawn yet."""

_GAMMA = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_RANDOM_BITS = 52


@dataclass(frozen=True, slots=True)
class Sampling:
    """How rows draw. Each tensor is [R]."""

    temperature: Tensor
    tail: Tensor
    """1 - top-P: the share of probability that may be cut off."""
    top_k: Tensor
    penalty: Tensor
    min_steps: Tensor
    """Steps before which a row cannot end."""
    seed: Tensor
    segment: Tensor
    attempt: Tensor

    def at(self, places: slice | Tensor) -> Sampling:
        """Of some rows only: the same memory for a slice, a copy for numbers."""
        return Sampling(*(getattr(self, name)[places] for name in self.__slots__))

    def retried(self, attempt: Tensor) -> Sampling:
        """The same, for other attempts."""
        return replace(self, attempt=attempt)


def process(logits: Tensor, recent: Tensor, step: Tensor, sampling: Sampling, end: int) -> Tensor:
    """What the softmax is taken of.

    Args:
        logits: [R, C, V], fp32.
        recent: [R, C, W], int64: each codebook's last tokens, `NO_TOKEN` where there is none.
        step: [R]: the step to draw for.
        sampling: of the R rows.
        end: the token that ends a row.

    Returns:
        [R, C, V]: what cannot be drawn is -inf.
    """
    scores = logits / sampling.temperature[:, None, None]
    scores = _penalise(scores, recent, sampling.penalty)
    scores = _keep_top(scores, sampling.tail, sampling.top_k)
    scores[..., end].masked_fill_((step < sampling.min_steps)[:, None], -torch.inf)
    return scores


def draw(scores: Tensor, step: Tensor, sampling: Sampling, codebook: int = 0) -> Tensor:
    """Draws a token for each row and codebook from the softmax of `scores`, by the Gumbel-max method.

    Args:
        scores: [R, C, V], processed.
        step: [R].
        sampling: of the R rows.
        codebook: the number of the first codebook.

    Returns:
        [R, C], int64.
    """
    return (scores + gumbel(_states(scores, step, sampling, codebook), scores.shape[-1])).argmax(-1)


def gumbel(states: Tensor, tokens: int) -> Tensor:
    """Standard Gumbel noise, fp32: [..., tokens] from states [...]."""
    bits = random_bits(states, tokens)
    # 52 bits and a half lie strictly between 0 and 1 in fp64, so that both logarithms are finite.
    uniform = bits.double().add_(0.5).mul_(2.0**-_RANDOM_BITS)
    return uniform.log_().neg_().log_().neg_().float()


def random_bits(states: Tensor, tokens: int) -> Tensor:
    """52 random bits for each token: output number `token` of the generator SplitMix64 started at a state.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; constants as in Vigna's
    splitmix64.c.
    """
    counter = torch.arange(1, tokens + 1, device=states.device).mul_(_signed(_GAMMA))
    return _shift(_mix(states[..., None] + counter), 64 - _RANDOM_BITS)


def absorb(state: Tensor, word: Tensor | int) -> Tensor:
    """The state that follows `state` when `word` is hashed into it. Integers are taken modulo 2**64."""
    return _mix((state + _signed(_GAMMA)) ^ word)


def _states(scores: Tensor, step: Tensor, sampling: Sampling, codebook: int) -> Tensor:
    """The generator's states, [R, C]."""
    state = torch.zeros_like(sampling.seed)
    for word in (sampling.seed, sampling.segment, sampling.attempt, step):
        state = absorb(state, word)
    codebooks = torch.arange(codebook, codebook + scores.shape[1], device=scores.device)
    return absorb(state[:, None], codebooks)


def _penalise(scores: Tensor, recent: Tensor, penalty: Tensor) -> Tensor:
    """Makes recent tokens less likely, by the penalty to the power of how often each was drawn."""
    # An empty place of the window stands for token 0 and counts nothing: what is written for it is right for token 0.
    tokens = recent.clamp_min(0)
    count = (tokens[..., :, None] == recent[..., None, :]).sum(-1)
    factor = penalty[:, None, None].pow(count)
    score = scores.gather(-1, tokens)
    return scores.scatter(-1, tokens, torch.where(score < 0, score * factor, score / factor))


def _keep_top(scores: Tensor, tail: Tensor, top_k: Tensor) -> Tensor:
    """Top-P and top-K, from one sorted order.

    Both keep an end of it: top-P cuts off the unlikeliest tokens, as many as `tail` holds, and top-K what lies below
    the k-th of all, which is below the k-th of what is left too. Of equal tokens top-P cuts those that the sort puts
    first, top-K none, as in `transformers` (`TopPLogitsWarper`, `TopKLogitsWarper`). The sort is the same as there, not
    a stable one, or ties would fall otherwise.
    """
    tokens = scores.shape[-1]
    ordered, order = scores.sort(dim=-1)
    cut = ordered.softmax(-1).cumsum(-1) <= tail[:, None, None]
    cut[..., -LEAST_KEPT:] = False
    kth = (tokens - top_k.clamp(LEAST_KEPT, tokens))[:, None, None].expand(*scores.shape[:-1], 1)
    cut |= ordered < ordered.gather(-1, kth)
    return scores.masked_fill(torch.zeros_like(cut).scatter_(-1, order, cut), -torch.inf)


def _mix(value: Tensor) -> Tensor:
    """SplitMix64's finaliser, on int64 as on unsigned integers."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        value = (value ^ _shift(value, shift)) * _signed(factor)
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """A shift to the right that moves in zeros."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """The int64 of the same bits."""
    return word - (1 << 64) if word >= 1 << 63 else word
