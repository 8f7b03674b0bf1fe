"""A layer's operations as kernels for a GPU. See `operations.py` for what they are, `kernels.py` for how."""

from __future__ import annotations

from torch import Tensor

from service.engines.chattts import draw_kernel, kernels
from service.engines.chattts.operations import Attend, Rotary, TorchOperations
from service.engines.chattts.sample import Sampling


class KernelOperations:
    """Kernels.

    Args:
        rotary: of all positions.
        plain: for vocabularies that the drawing kernel cannot sort: a refined text's.
        eps: of the norms.
    """

    spans = False

    def __init__(self, rotary: Rotary, plain: TorchOperations, eps: float) -> None:
        self._rotary, self._plain, self._eps = rotary, plain, eps

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """See the protocol."""
        return kernels.norm(x, weight, self._eps)

    def add_norm(self, x: Tensor, change: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See the protocol."""
        return kernels.add_norm(x, change, weight, self._eps)

    def gate(self, gate_up: Tensor) -> Tensor:
        """See the protocol."""
        return kernels.gate(gate_up)

    def attention(self, positions: Tensor, span: int) -> Attend:
        """By as many tokens as each row has."""
        rotary, positions = self._rotary, positions.contiguous()

        def attend(qkv: Tensor, cache: Tensor) -> Tensor:
            keys, values = cache.unbind()
            queries = kernels.rotate_and_store(qkv, rotary.cos, rotary.sin, positions, keys, values)
            return kernels.attend(queries, keys, values, positions)

        return attend

    def draw(self, logits: Tensor, recent: Tensor, step: Tensor, sampling: Sampling, end: int, codebook: int) -> Tensor:
        """See the protocol."""
        fits = logits.shape[-1] <= draw_kernel.MOST_TOKENS
        drawing = draw_kernel.draw if fits else self._plain.draw
        return drawing(logits, recent, step, sampling, end, codebook)
