"""What a layer does between its products: norms, attention over the cache, the gate.

`TorchOperations` are torch's own operators, which every device has. `gpu_operations.py` has the same as kernels for a
GPU, where a step of few rows takes as long as its launches do, and where attention should read only what is live.

In shapes, B are rows, H the hidden size, A heads, D a head's size, S slots, L a slot's length, F the gate's width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from service.engines.chattts.sample import Sampling, draw, process

Attend = Callable[[Tensor, Tensor], Tensor]
"""Projections [B, 3·A·D] and a layer's cache [2, S, A, L, D], which takes in the new keys and values, to [B, A·D]."""


class Operations(Protocol):
    """One way to do them. None waits for the device."""

    spans: bool
    """Attention reads as many cached tokens as it is told; otherwise as many as each row has."""

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """The RMS norm, [B, H]."""
        ...

    def add_norm(self, x: Tensor, change: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The sum, and its norm."""
        ...

    def gate(self, gate_up: Tensor) -> Tensor:
        """SwiGLU: [B, 2·F] to [B, F]."""
        ...

    def attention(self, positions: Tensor, span: int) -> Attend:
        """Of one step, for all layers.

        Args:
            positions: [B], where the rows' tokens come to stand.
            span: cached tokens to read, above every position. Counts where `spans`.
        """
        ...

    def draw(self, logits: Tensor, recent: Tensor, step: Tensor, sampling: Sampling, end: int, codebook: int) -> Tensor:
        """Tokens, [B, codebooks]: `process` and `draw` of `sample.py`."""
        ...


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary positions.

    Args of the tables: [L, D]; the sines of the first half are negated, see `turned`.
    """

    cos: Tensor
    sin: Tensor

    def at(self, positions: Tensor | slice) -> Rotary:
        """Of some positions."""
        return Rotary(self.cos[positions], self.sin[positions])

    def shaped(self, *shape: int) -> Rotary:
        """To fit what is turned."""
        return Rotary(self.cos.view(shape), self.sin.view(shape))

    def turned(self, x: Tensor) -> Tensor:
        """Turns each pair (i, i + D/2) by its position's angle."""
        return torch.addcmul(x * self.cos, x.roll(x.shape[-1] // 2, dims=-1), self.sin)


class TorchOperations:
    """Torch's operators.

    Args:
        rotary: of all positions.
        heads: A.
        eps: of the norms.
        slots: S.
    """

    spans = True

    def __init__(self, rotary: Rotary, heads: int, eps: float, slots: int) -> None:
        device = rotary.cos.device
        self._rotary, self._heads, self._eps = rotary, heads, eps
        self._length, self._head_dim = rotary.cos.shape
        self._columns = torch.arange(self._length, device=device)
        numbers = torch.arange(2 * slots * heads, device=device).view(2, slots, heads)
        self._first_tokens = numbers * self._length
        """[2, S, A]: where the cache's vectors of each row and head begin."""

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """In one operator; in half precision it rounds once less than upstream's."""
        return rms_norm(x, weight.shape, weight, self._eps)

    def add_norm(self, x: Tensor, change: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See the protocol."""
        total = x + change
        return total, self.norm(total, weight)

    def gate(self, gate_up: Tensor) -> Tensor:
        """See the protocol."""
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    def attention(self, positions: Tensor, span: int) -> Attend:
        """By torch's scaled dot product attention, with a mask."""
        rows, heads, head_dim = len(positions), self._heads, self._head_dim
        rotary = self._rotary.at(positions).shaped(rows, 1, 1, head_dim)
        unseen = self._columns[:span] > positions[:, None]
        mask = torch.zeros_like(unseen, dtype=rotary.cos.dtype).masked_fill_(unseen, -math.inf)[:, None, None]
        target = (self._first_tokens[:, :rows] + positions[None, :, None]).flatten()

        def attend(qkv: Tensor, cache: Tensor) -> Tensor:
            parts = qkv.view(rows, 3, heads, head_dim)
            turned = rotary.turned(parts[:, :2])
            new = torch.stack((turned[:, 1], parts[:, 2]))
            cache.view(-1, head_dim).index_copy_(0, target, new.view(-1, head_dim))
            keys, values = cache[:, :rows, :, :span].unbind()
            attended = scaled_dot_product_attention(turned[:, 0, :, None], keys, values, attn_mask=mask)
            return attended.view(rows, heads * head_dim)

        return attend

    def draw(self, logits: Tensor, recent: Tensor, step: Tensor, sampling: Sampling, end: int, codebook: int) -> Tensor:
        """See the protocol."""
        return draw(process(logits, recent, step, sampling, end), step, sampling, codebook)
