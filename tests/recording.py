"""A stand-in for CUDA graphs on a CPU: records a call's operators, and does the same to the same memory again.

Like a graph it knows nothing of the Python that made it, so that what a call takes from anywhere but the memory of its
tensors is frozen; and like a capture it refuses what would wait for the device. Unlike a capture it does the call while
it records it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from service.engines.chattts.graphs import Call, Outputs

aten: Any = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.nonzero.default,
    aten.is_nonzero.default,
    aten.equal.default,
}
"""Operators whose result the host looks at."""


class Recorder:
    """A `service.engines.chattts.graphs.Recorder`."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, call: Call) -> Call:
        recording = _Recording()
        with recording:
            outputs = call()
        self.recorded += 1

        def replay() -> Outputs:
            self.replayed += 1
            recording.replay()
            return outputs

        return replay


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operator in WAITING:
            raise RuntimeError(f"{operator} would wait for the device")
        outputs = operator(*args, **(kwargs or {}))
        # An output that is a view is there already; whether `to` or `reshape` give one, the schema doesn't say.
        known = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        fresh = [tensor for tensor in _tensors(outputs) if _memory(tensor) not in known]
        if fresh or any(each.alias_info is not None and each.alias_info.is_write for each in operator._schema.returns):
            self._calls.append((operator, args, kwargs or {}, fresh))
        return outputs

    def replay(self) -> None:
        for operator, args, kwargs, outputs in self._calls:
            made = _tensors(operator(*args, **kwargs))
            for output, value in zip(outputs, made, strict=False):
                output.copy_(value)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()
