"""Products with a layer's weights, each in the form that its device reads fastest.

A step of few rows takes as long as the weights take to be read. On a CPU, oneDNN packs weights once instead of at each
call, in bf16 too where the processor multiplies that itself; and as 8-bit integers they are a quarter of the bytes of
fp32, which FBGEMM multiplies without making floats of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.cpu
from torch import Tensor
from torch.nn.functional import linear

Linear = Callable[[Tensor], Tensor]
"""[..., inputs] to [..., outputs]."""

WEIGHT_LEVELS = 63
"""Of int8 weights, each side of zero: 7 bits. Where a processor has no VNNI it adds two products of 8 bits in 16, and
only so can't they overflow (255 * 63 * 2 < 2**15). The same everywhere, so that tokens are."""
INPUT_LEVELS = 127
"""Of int8 inputs, each side of zero."""
_ZERO_POINT = 128
_PEAK = 1e-30
"""Below it, inputs are nothing."""


def pack(weight: Tensor, *, int8: bool = False) -> Linear:
    """The product with a weight, which need not be kept.

    Args:
        weight: [outputs, inputs].
        int8: from a weight in fp32 on a CPU that `has_int8`.
    """
    if int8:
        return _Int8(weight)
    quick = weight.dtype is torch.float32 or (weight.dtype is torch.bfloat16 and has_bf16())
    if quick and weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return _Packed(weight)
    return _Plain(weight)


def has_bf16() -> bool:
    """Whether this processor multiplies bf16 itself."""
    features = torch.cpu.get_capabilities()
    return any(features.get(feature) for feature in ("amx_bf16", "avx512_bf16"))


def has_int8() -> bool:
    """Whether this processor, and this build of torch, has the integer products."""
    return "fbgemm" in torch.backends.quantized.supported_engines


class _Plain:
    """As torch does it."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self._weight)


class _Packed:
    """fp32 or bf16, laid out for oneDNN: by the operators that torch's compiler puts into frozen models."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")
        return y


class _Int8:
    """Integers, with a scale for each output and one for each row of inputs.

    Each row has a scale of its own, and integers add up exactly: so a row's result is the same bit for bit, whatever
    else is in the batch. That is why torch's own dynamic quantisation, with one scale for the whole input, won't do.
    """

    def __init__(self, weight: Tensor) -> None:
        scales = weight.abs().amax(dim=1).clamp_min(_PEAK).double() / WEIGHT_LEVELS
        with warnings.catch_warnings():
            # Quantised tensors are to go from torch some day; FBGEMM's products have no other door yet.
            warnings.simplefilter("ignore", UserWarning)
            quantised = torch.quantize_per_channel(
                weight, scales, torch.zeros(len(scales), dtype=torch.int64), 0, torch.qint8
            )
            before, torch.backends.quantized.engine = torch.backends.quantized.engine, "fbgemm"
            try:
                self._weight = torch.ops.quantized.linear_prepack(quantised, None)
            finally:
                torch.backends.quantized.engine = before

    def __call__(self, x: Tensor) -> Tensor:
        peak = x.abs().amax(dim=-1, keepdim=True).clamp_min_(_PEAK)  # an infinity norm is many times slower
        product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / peak, 1 / INPUT_LEVELS, _ZERO_POINT, self._weight
        )
        return product.mul_(peak)
