"""The transformer, written plainly over its weights, with a cache of slots that rows join and leave.

Llama's layers as in `transformers/models/llama/modeling_llama.py`, which upstream builds on: RMS norm, rotary
positions, SwiGLU. Projections that read the same input are one product. There are two ways through it: `prefill` takes
the prompts of rows that join, `decode` one token of each row that runs.

In shapes, B are rows, T tokens, H the hidden size, A heads, D a head's size, S slots, L a slot's length.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from service.engines.chattts.linear import Linear, pack
from service.engines.chattts.load import Dimensions, Weights


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights."""

    attention_norm: Tensor
    qkv: Linear
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Gpt:
    """The layers and their cache.

    Args:
        weights: the model's.
        slots: rows that the cache holds.
        length: tokens that a slot holds, the prompt's included.
    """

    def __init__(self, weights: Weights, slots: int, length: int) -> None:
        d = weights.dimensions
        self.slots = slots
        self.length = length
        self._heads, self._head_dim, self._eps = d.heads, d.head_dim, d.norm_eps
        self._layers = [_layer(weights, number) for number in range(d.layers)]
        self._norm = weights.gpt["norm.weight"]
        self._cos, self._sin = _rotary_tables(d, length, weights)
        shape = (d.layers, slots, d.heads, length, d.head_dim)
        self._keys = _zeros(shape, weights.dtype, weights.device)
        self._values = _zeros(shape, weights.dtype, weights.device)
        self._places = torch.arange(slots, device=weights.device)
        self._columns = torch.arange(length, device=weights.device)
        self._head_numbers = torch.arange(d.heads, device=weights.device)

    def prefill(self, inputs: Tensor, lengths: Tensor, first: int) -> Tensor:
        """Runs prompts into the cache.

        Prompts are padded at their end. What padding leaves in the cache lies behind the row's tokens, where it is
        overwritten before it is read; so a row's positions are those that upstream counts by its mask.

        Args:
            inputs: [B, T, H], embeddings.
            lengths: [B], each prompt's tokens.
            first: the place of the first row; the others take those behind it.

        Returns:
            [B, H], fp32: the state that predicts the first token.
        """
        rows, tokens, _ = inputs.shape
        cos, sin = self._cos[:tokens], self._sin[:tokens]
        x = inputs
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            q, k, v = self._project(layer, x)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            keys[first : first + rows, :, :tokens] = k
            values[first : first + rows, :, :tokens] = v
            x = self._finish(layer, x, scaled_dot_product_attention(q, k, v, is_causal=True))
        last = x[self._places[:rows], lengths - 1]
        return _rms_norm(last, self._norm, self._eps).float()

    def decode(self, inputs: Tensor, positions: Tensor, span: int) -> Tensor:
        """Runs one token of each row at the places 0 to B.

        Nothing in here waits for the device or depends on its values, so it can be captured for each pair of B and
        `span`.

        Args:
            inputs: [B, H], embeddings.
            positions: [B], where the tokens come to stand in their rows.
            span: cached tokens to read, above every position.

        Returns:
            [B, H], fp32.
        """
        rows = inputs.shape[0]
        cos, sin = self._cos[positions][:, None, None], self._sin[positions][:, None, None]
        unseen = self._columns[:span] > positions[:, None]
        mask = torch.zeros_like(unseen, dtype=inputs.dtype).masked_fill_(unseen, -math.inf)[:, None, None]
        index = (self._places[:rows, None], self._head_numbers[None, :], positions[:, None])
        x = inputs[:, None]
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            q, k, v = self._project(layer, x)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            keys.index_put_(index, k[:, :, 0])
            values.index_put_(index, v[:, :, 0])
            live = keys[:rows, :, :span], values[:rows, :, :span]
            x = self._finish(layer, x, scaled_dot_product_attention(q, *live, attn_mask=mask))
        return _rms_norm(x[:, 0], self._norm, self._eps).float()

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copies what is cached of a row to another place."""
        for cache in (self._keys, self._values):
            cache[:, target, :, :tokens] = cache[:, source, :, :tokens]

    def _project(self, layer: _Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, A, T, D]."""
        rows, tokens, _ = x.shape
        qkv = layer.qkv(_rms_norm(x, layer.attention_norm, self._eps))
        q, k, v = qkv.view(rows, tokens, 3, self._heads, self._head_dim).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _finish(self, layer: _Layer, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention: [B, T, H]."""
        x = x + layer.out(attended.transpose(1, 2).flatten(2))
        gate, up = layer.gate_up(_rms_norm(x, layer.mlp_norm, self._eps)).chunk(2, dim=-1)
        return x + layer.down(silu(gate) * up)


def slot_bytes(dimensions: Dimensions, length: int, dtype: torch.dtype) -> int:
    """Memory that a slot of the cache takes when it is full."""
    return 2 * dimensions.layers * dimensions.heads * dimensions.head_dim * length * dtype.itemsize


def _layer(weights: Weights, number: int) -> _Layer:
    def get(name: str) -> Tensor:
        return weights.gpt[f"layers.{number}.{name}.weight"]

    def linear(*names: str) -> Linear:
        return pack(torch.cat([get(name) for name in names]), int8=weights.int8)

    return _Layer(
        attention_norm=get("input_layernorm"),
        qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out=linear("self_attn.o_proj"),
        mlp_norm=get("post_attention_layernorm"),
        gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
        down=linear("mlp.down_proj"),
    )


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def _rotary_tables(dimensions: Dimensions, length: int, weights: Weights) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each position, [length, D]; the sines of the first half negated, see `_rotate`."""
    exponents = torch.arange(0, dimensions.head_dim, 2, dtype=torch.float32) / dimensions.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / dimensions.rope_theta**exponents)
    cos, sin = torch.cat([angles.cos()] * 2, dim=-1), torch.cat([-angles.sin(), angles.sin()], dim=-1)
    return cos.to(weights.device, weights.dtype), sin.to(weights.device, weights.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (i, i + D/2) by its position's angle."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU they take memory only where they have been written to."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
