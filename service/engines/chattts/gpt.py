"""The transformer, written plainly over its weights, with a cache of slots that rows join and leave.

Llama's layers as in `transformers/models/llama/modeling_llama.py`, which upstream builds on: RMS norm, rotary
positions, SwiGLU. Projections that read the same input are one product. There are two ways through it: `prefill` takes
the prompts of rows that join, `decode` one token of each row that runs. Nothing in either waits for the device or
depends on its values, so both can be captured; see `graphs.py`.

In shapes, B are rows, T tokens, H the hidden size, A heads, D a head's size, S slots, L a slot's length.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from service.engines.chattts.linear import Linear, pack
from service.engines.chattts.load import Dimensions, Weights
from service.engines.chattts.operations import Operations, Rotary, TorchOperations


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
        kernels: use the kernels for a GPU.
    """

    def __init__(self, weights: Weights, slots: int, length: int, *, kernels: bool = False) -> None:
        d = weights.dimensions
        self.slots = slots
        self.length = length
        self._heads, self._head_dim = d.heads, d.head_dim
        self._layers = [_layer(weights, number) for number in range(d.layers)]
        self._norm = weights.gpt["norm.weight"]
        self._rotary = _rotary(d, length, weights)
        self.operations = _operations(self._rotary, d, slots, kernels=kernels)
        shape = (d.layers, 2, slots, d.heads, length, d.head_dim)
        self._cache = _zeros(shape, weights.dtype, weights.device)
        """Keys and values."""

    def prefill(self, inputs: Tensor, lengths: Tensor, places: Tensor) -> Tensor:
        """Runs prompts into the cache.

        Prompts are padded at their end. What padding leaves in the cache lies behind the row's tokens, where it is
        overwritten before it is read; so a row's positions are those that upstream counts by its mask.

        Args:
            inputs: [B, T, H], embeddings.
            lengths: [B], each prompt's tokens.
            places: [B], the rows' places.

        Returns:
            [B, H], fp32: the state that predicts the first token.
        """
        rows, tokens, hidden = inputs.shape
        op, rotary = self.operations, self._rotary.at(slice(tokens)).shaped(tokens, 1, 1, self._head_dim)
        x = inputs.flatten(0, 1)
        normed = op.norm(x, self._layers[0].attention_norm)
        for layer, cache, next_norm in zip(self._layers, self._cache, self._next_norms(), strict=True):
            qkv = layer.qkv(normed).view(rows, tokens, 3, self._heads, self._head_dim)
            q, k = rotary.turned(qkv[:, :, :2]).permute(2, 0, 3, 1, 4)
            v = qkv[:, :, 2].transpose(1, 2)
            cache[:, :, :, :tokens].index_copy_(1, places, torch.stack((k, v)))
            attended = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2).flatten(0, 1)
            x, normed = op.add_norm(x, layer.out(attended), layer.mlp_norm)
            x, normed = op.add_norm(x, layer.down(op.gate(layer.gate_up(normed))), next_norm)
        each_row = torch.arange(rows, device=inputs.device)
        return normed.view(rows, tokens, hidden)[each_row, lengths - 1].float()

    def decode(self, inputs: Tensor, positions: Tensor, span: int) -> Tensor:
        """Runs one token of each row at the places 0 to B.

        Args:
            inputs: [B, H], embeddings.
            positions: [B], where the tokens come to stand in their rows.
            span: cached tokens to read, above every position.

        Returns:
            [B, H], fp32.
        """
        op = self.operations
        attend = op.attention(positions, span)
        x, normed = inputs, op.norm(inputs, self._layers[0].attention_norm)
        for layer, cache, next_norm in zip(self._layers, self._cache, self._next_norms(), strict=True):
            x, normed = op.add_norm(x, layer.out(attend(layer.qkv(normed), cache)), layer.mlp_norm)
            x, normed = op.add_norm(x, layer.down(op.gate(layer.gate_up(normed))), next_norm)
        return normed.float()

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copies what is cached of a row to another place."""
        self._cache[:, :, target, :, :tokens] = self._cache[:, :, source, :, :tokens]

    def _next_norms(self) -> list[Tensor]:
        """What follows each layer: the next one's first norm, or the last."""
        return [*(layer.attention_norm for layer in self._layers[1:]), self._norm]


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


def _operations(rotary: Rotary, dimensions: Dimensions, slots: int, *, kernels: bool) -> Operations:
    plain = TorchOperations(rotary, dimensions.heads, dimensions.norm_eps, slots)
    if not kernels:
        return plain
    from service.engines.chattts.gpu_operations import KernelOperations  # Triton is there only where a GPU is

    return KernelOperations(rotary, plain, dimensions.norm_eps)


def _rotary(dimensions: Dimensions, length: int, weights: Weights) -> Rotary:
    """Of all positions that a slot has."""
    exponents = torch.arange(0, dimensions.head_dim, 2, dtype=torch.float32) / dimensions.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / dimensions.rope_theta**exponents)
    cos, sin = torch.cat([angles.cos()] * 2, dim=-1), torch.cat([-angles.sin(), angles.sin()], dim=-1)
    return Rotary(cos.to(weights.device, weights.dtype), sin.to(weights.device, weights.dtype))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU they take memory only where they have been written to."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
