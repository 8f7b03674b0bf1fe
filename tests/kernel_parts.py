"""Kernels that run a part of another, so that it can be looked at."""

from __future__ import annotations

import triton
import triton.language as tl

from service.engines.chattts.draw_kernel import _keep_top, _random_bits


@triton.jit
def bits_kernel(words, out, tokens: tl.constexpr):
    row = tl.program_id(0)
    token = tl.arange(0, tokens).to(tl.int64)
    seed, segment, attempt = tl.load(words + row * 5), tl.load(words + row * 5 + 1), tl.load(words + row * 5 + 2)
    step, codebook = tl.load(words + row * 5 + 3), tl.load(words + row * 5 + 4)
    bits = _random_bits(seed, segment, attempt, step, codebook, token)
    tl.store(out + row * tokens + token, bits)


@triton.jit
def top_kernel(scores, tail, top_k, out, tokens: tl.constexpr, least_kept: tl.constexpr, lanes: tl.constexpr):
    row = tl.program_id(0)
    token = tl.arange(0, lanes).to(tl.int64)
    real = token < tokens
    score = tl.load(scores + row * tokens + token, mask=real, other=0.0)
    top = _keep_top(score, token, tl.load(tail + row), tl.load(top_k + row), tokens, least_kept, lanes)
    tl.store(out + row * tokens + token, top, mask=real)
