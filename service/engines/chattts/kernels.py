"""A decode step's small kernels for a GPU, in Triton: norm, rotation into the cache, attention, gate.

Each is checked against the plain code in `operations.py`. They read and write bf16, fp16 or fp32 and compute in fp32.
Nothing in them waits for the device, and a grid depends on shapes alone: so they can be captured in a CUDA graph, once
each has run with the same shapes outside of a capture, which compiles it. They launch on the current device's current
stream.

This module imports Triton, which a CPU needs only for tests: import it where a GPU is used.

In shapes, B are rows, H the hidden size, A heads, D a head's size, S slots, L a slot's length, F the gate's size.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 64
"""Cached tokens that a program of `attend` reads at a time."""
_STAGES = 3
"""Of its loop: while it computes on a block, all but one of so many are on their way to shared memory."""
_PROGRAMS = 1536
"""Up to so many programs, attention is split: about twelve for each of an H100's multiprocessors."""
_MOST_SPLITS = 32
_GATE_BLOCK = 1024
_HEADS_AT_ONCE = 4
_NOTHING = tl.constexpr(-1e30)
"""Below every score, and finite: two of it have a difference."""


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm.

    Args:
        x: [B, H].
        weight: [H].
        eps: is added to the mean square.

    Returns:
        [B, H].

    Raises:
        ValueError: a row is not contiguous.
    """
    _check_rows(x, weight)
    rows, size = x.shape
    normed = x.new_empty(rows, size)
    _norm_kernel[(rows,)](x, weight, normed, eps, x.stride(0), size, lanes=triton.next_power_of_2(size))
    return normed


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual sum, and its RMS norm.

    Args:
        x: [B, H].
        delta: [B, H], what is added to it.
        weight: [H].
        eps: is added to the mean square.

    Returns:
        Both [B, H]; the norm is that of the sum as it is rounded.

    Raises:
        ValueError: a row is not contiguous.
    """
    _check_rows(x, delta, weight)
    rows, size = x.shape
    total, normed = x.new_empty(rows, size), x.new_empty(rows, size)
    strides = x.stride(0), delta.stride(0)
    lanes = triton.next_power_of_2(size)
    _add_norm_kernel[(rows,)](x, delta, weight, total, normed, eps, *strides, size, lanes=lanes)
    return total, normed


def rotate_and_store(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Turns queries and keys by their positions' angles, and writes keys and values into the cache.

    Row b's go to `keys[b, :, positions[b]]` and `values[b, :, positions[b]]`.

    Args:
        qkv: [B, 3 * A * D], queries, keys and values.
        cos: [L, D].
        sin: [L, D], those of the first half negated.
        positions: [B], int64, each at least 0 and below L. Nothing checks it.
        keys: [S, A, L, D], S at least B, is written to.
        values: likewise.

    Returns:
        [B, A, D], the queries.

    Raises:
        ValueError: a row of one of them is not contiguous.
    """
    _check_rows(qkv, cos, sin, positions, keys, values)
    rows, (_, heads, _, size) = qkv.shape[0], keys.shape
    queries = qkv.new_empty(rows, heads, size)
    _rotate_kernel[(rows, triton.cdiv(heads, _HEADS_AT_ONCE))](
        qkv,
        cos,
        sin,
        positions,
        keys,
        values,
        queries,
        qkv.stride(0),
        cos.stride(0),
        sin.stride(0),
        *keys.stride()[:3],
        *values.stride()[:3],
        heads=heads,
        size=size,
        half_lanes=triton.next_power_of_2(size // 2),
        head_lanes=_HEADS_AT_ONCE,
        num_warps=1,
    )
    return queries


def attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, splits: int | None = None) -> Tensor:
    """Attention of one token a row to the cached ones: row b to those at 0 to `positions[b]`, with scale 1 / sqrt(D).

    Of the cache, nothing else is read: what lies behind a row's last token, and in other rows, may be anything. Each
    row and head is split into parts along its tokens, which programs of their own attend to, and which a second kernel
    weighs by their sums; how many tokens a part has depends on the row's own length. Parts behind the row's end are
    left at once. A row's last bits depend on the number of splits, and on nothing else of the batch.

    Source: Dao, Haziza, Massa, Sizov, "Flash-Decoding for long-context inference", 2023. Within a part, each lane keeps
    a maximum and a sum of its own, so that lanes wait for each other at its end only.

    Args:
        q: [B, A, D].
        keys: [S, A, L, D], S at least B.
        values: likewise.
        positions: [B], int64, each at least 0 and below L. Nothing checks it.
        splits: parts, at most; as `splits_of` says, unless it is given.

    Returns:
        [B, A * D].

    Raises:
        ValueError: a row of one of them is not contiguous.
    """
    _check_rows(q, keys, values, positions)
    rows, heads, size = q.shape
    splits = splits or splits_of(rows, heads)
    out = q.new_empty(rows, heads * size)
    part, logs = out, positions
    if splits > 1:
        part = torch.empty(rows, heads, splits, size, dtype=torch.float32, device=q.device)
        logs = torch.empty(rows, heads, splits, dtype=torch.float32, device=q.device)
    lanes = triton.next_power_of_2(size)
    _attend_kernel[(rows, heads, splits)](
        q,
        keys,
        values,
        positions,
        part,
        logs,
        math.log2(math.e) / math.sqrt(size),
        *q.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        heads=heads,
        size=size,
        lanes=lanes,
        block=_BLOCK,
        splits=splits,
        stages=_STAGES,
    )
    if splits > 1:
        _combine_kernel[(rows, heads)](
            part,
            logs,
            positions,
            out,
            heads=heads,
            size=size,
            lanes=lanes,
            block=_BLOCK,
            splits=splits,
            split_lanes=triton.next_power_of_2(splits),
            num_warps=2,
        )
    return out


def splits_of(rows: int, heads: int) -> int:
    """Parts that `attend` splits each row and head into: as many as keep a GPU busy where rows alone do not.

    More would help long rows among many short ones, and cost all the others a program that finds nothing to do.
    """
    parts = max(1, min(_PROGRAMS // (rows * heads), _MOST_SPLITS))
    return 1 << (parts.bit_length() - 1)


def gate(gate_up: Tensor) -> Tensor:
    """SwiGLU's product: SiLU of the first half times the second.

    Args:
        gate_up: [B, 2 * F].

    Returns:
        [B, F].

    Raises:
        ValueError: a row is not contiguous.
    """
    _check_rows(gate_up)
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    lanes = min(triton.next_power_of_2(size), _GATE_BLOCK)
    _gate_kernel[(rows, triton.cdiv(size, lanes))](gate_up, out, gate_up.stride(0), size, lanes=lanes)
    return out


def _check_rows(*tensors: Tensor) -> None:
    if any(tensor.shape[-1] > 1 and tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError("the last dimension must be contiguous")


@triton.jit
def _normed(x, weight, eps, size):
    """Of a row in fp32, padded with zeros."""
    return x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps) * weight.to(tl.float32)


@triton.jit
def _norm_kernel(x, weight, normed, eps, stride, size, lanes: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, lanes)
    real = lane < size
    wide = tl.load(x + row * stride + lane, mask=real, other=0.0).to(tl.float32)
    scale = tl.load(weight + lane, mask=real, other=0.0)
    tl.store(normed + row * size + lane, _normed(wide, scale, eps, size), mask=real)


@triton.jit
def _add_norm_kernel(x, delta, weight, total, normed, eps, x_stride, delta_stride, size, lanes: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, lanes)
    real = lane < size
    added = tl.load(delta + row * delta_stride + lane, mask=real, other=0.0).to(tl.float32)
    wide = tl.load(x + row * x_stride + lane, mask=real, other=0.0).to(tl.float32) + added
    rounded = wide.to(total.dtype.element_ty)
    tl.store(total + row * size + lane, rounded, mask=real)
    scale = tl.load(weight + lane, mask=real, other=0.0)
    tl.store(normed + row * size + lane, _normed(rounded.to(tl.float32), scale, eps, size), mask=real)


@triton.jit
def _rotate_kernel(
    qkv,
    cos,
    sin,
    positions,
    keys,
    values,
    queries,
    qkv_stride,
    cos_stride,
    sin_stride,
    keys_row,
    keys_head,
    keys_token,
    values_row,
    values_head,
    values_token,
    heads: tl.constexpr,
    size: tl.constexpr,
    half_lanes: tl.constexpr,
    head_lanes: tl.constexpr,
):
    """Some heads of a row, both halves of each side by side: a pair to turn is two of the same lane."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    half: tl.constexpr = size // 2
    first = tl.arange(0, half_lanes)[None, :]
    head = tl.program_id(1) * head_lanes + tl.arange(0, head_lanes)[:, None]
    real = (head < heads) & (first < half)
    second = first + half

    turn_cos = cos + position * cos_stride
    turn_sin = sin + position * sin_stride
    cos_first = tl.load(turn_cos + first, mask=first < half, other=0.0).to(tl.float32)
    cos_second = tl.load(turn_cos + second, mask=first < half, other=0.0).to(tl.float32)
    sin_first = tl.load(turn_sin + first, mask=first < half, other=0.0).to(tl.float32)
    sin_second = tl.load(turn_sin + second, mask=first < half, other=0.0).to(tl.float32)

    source = qkv + row * qkv_stride + head * size
    q_first = tl.load(source + first, mask=real, other=0.0).to(tl.float32)
    q_second = tl.load(source + second, mask=real, other=0.0).to(tl.float32)
    target = queries + row * heads * size + head * size
    tl.store(target + first, q_first * cos_first + q_second * sin_first, mask=real)
    tl.store(target + second, q_second * cos_second + q_first * sin_second, mask=real)

    source += heads * size
    k_first = tl.load(source + first, mask=real, other=0.0).to(tl.float32)
    k_second = tl.load(source + second, mask=real, other=0.0).to(tl.float32)
    target = keys + row * keys_row + position * keys_token + head * keys_head
    tl.store(target + first, k_first * cos_first + k_second * sin_first, mask=real)
    tl.store(target + second, k_second * cos_second + k_first * sin_second, mask=real)

    source += heads * size
    target = values + row * values_row + position * values_token + head * values_head
    tl.store(target + first, tl.load(source + first, mask=real, other=0.0), mask=real)
    tl.store(target + second, tl.load(source + second, mask=real, other=0.0), mask=real)


@triton.jit
def _part_length(length, block: tl.constexpr, splits: tl.constexpr):
    """Tokens of each part of a row, whole blocks of them."""
    return tl.cdiv(length, block * splits) * block


@triton.jit
def _attend_kernel(
    q,
    keys,
    values,
    positions,
    part,
    logs,
    scale,
    q_row,
    q_head,
    keys_row,
    keys_head,
    keys_token,
    values_row,
    values_head,
    values_token,
    heads: tl.constexpr,
    size: tl.constexpr,
    lanes: tl.constexpr,
    block: tl.constexpr,
    splits: tl.constexpr,
    stages: tl.constexpr,
):
    """A part of a row and head. `part` is the result itself where there is one alone."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    length = (tl.load(positions + row) + 1).to(tl.int32)
    tokens = _part_length(length, block, splits)
    start = split * tokens
    end = tl.minimum(start + tokens, length)
    if start < end:
        lane = tl.arange(0, lanes)[None, :]
        column = tl.arange(0, block)[:, None]
        query = tl.load(q + row * q_row + head * q_head + lane, mask=lane < size, other=0.0).to(tl.float32) * scale
        key_rows = keys + row * keys_row + head * keys_head + lane
        value_rows = values + row * values_row + head * values_head + lane
        # Every lane of a column has a maximum, a sum and a weighted value of its own, until the part's end.
        peak = tl.full([block], _NOTHING, tl.float32)
        total = tl.zeros([block], tl.float32)
        weighted = tl.zeros([block, lanes], tl.float32)
        # The stages make Triton fetch blocks ahead; a compiler left alone waits for keys before it asks for values.
        for begin in tl.range(start, end, block, num_stages=stages):
            token = begin + column
            live = token < end
            if size < lanes:
                live = live & (lane < size)
            key = tl.load(key_rows + token * keys_token, mask=live, other=0.0).to(tl.float32)
            value = tl.load(value_rows + token * values_token, mask=live, other=0.0).to(tl.float32)
            score = tl.sum(query * key, axis=1)
            score = tl.where(begin + tl.arange(0, block) < end, score, float("-inf"))
            higher = tl.maximum(peak, score)
            shrink = tl.exp2(peak - higher)
            weight = tl.exp2(score - higher)
            total = total * shrink + weight
            weighted = weighted * shrink[:, None] + weight[:, None] * value
            peak = higher
        highest = tl.max(peak, axis=0)
        share = tl.exp2(peak - highest)
        total_all = tl.sum(total * share, axis=0)
        result = tl.sum(weighted * share[:, None], axis=0) / total_all
        place = (row * heads + head) * splits + split
        out_lane = tl.arange(0, lanes)
        tl.store(part + place * size + out_lane, result, mask=out_lane < size)
        if splits > 1:
            tl.store(logs + place, highest + tl.log2(total_all))


@triton.jit
def _combine_kernel(
    part,
    logs,
    positions,
    out,
    heads: tl.constexpr,
    size: tl.constexpr,
    lanes: tl.constexpr,
    block: tl.constexpr,
    splits: tl.constexpr,
    split_lanes: tl.constexpr,
):
    """Weighs the parts of a row and head. Those behind its end were never written."""
    row = tl.program_id(0).to(tl.int64)
    place = row * heads + tl.program_id(1)
    length = (tl.load(positions + row) + 1).to(tl.int32)
    count = tl.cdiv(length, _part_length(length, block, splits))
    split = tl.arange(0, split_lanes)
    log = tl.load(logs + place * splits + split, mask=split < count, other=float("-inf"))
    share = tl.exp2(log - tl.max(log, axis=0))
    share = share / tl.sum(share, axis=0)
    lane = tl.arange(0, lanes)
    offset = (place * splits + split[:, None]) * size + lane[None, :]
    live = (split[:, None] < count) & (lane[None, :] < size)
    parts = tl.load(part + offset, mask=live, other=0.0)
    result = tl.sum(share[:, None] * parts, axis=0)
    tl.store(out + place * size + lane, result, mask=lane < size)


@triton.jit
def _gate_kernel(gate_up, out, stride, size, lanes: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * lanes + tl.arange(0, lanes)
    real = lane < size
    gated = tl.load(gate_up + row * stride + lane, mask=real, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + size + lane, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * size + lane, gated * tl.sigmoid(gated) * up, mask=real)
