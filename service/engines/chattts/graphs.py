"""Calls of fixed shapes, recorded once and replayed.

It is for a GPU, where the launches of a step of few rows take longer than the step.

A recorded call reads and writes the same memory each time. So what goes in must lie in tensors that stay, and what
comes out is valid until the next replay of any call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]


class Recorder(Protocol):
    """Records what a call asks of the device, without doing it."""

    def __call__(self, call: Call) -> Call:
        """The recorded call. Nothing in the original may wait for the device."""
        ...


class CudaRecorder:
    """CUDA graphs, which share their memory.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device, priority=-1)  # what is replayed is as urgent as this

    def __call__(self, call: Call) -> Call:
        """By hand: `torch.cuda.graph` would collect garbage and empty the cache each time."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                outputs = call()
            finally:
                graph.capture_end()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


class Graphs:
    """The recorded calls.

    Args:
        recorder: None: nothing is recorded.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self._recorded: dict[Hashable, Call] = {}

    @property
    def on(self) -> bool:
        """Calls can be recorded."""
        return self._recorder is not None

    def record(self, key: Hashable, call: Callable[..., Outputs], *given: Any) -> None:
        """Calls once, so that whatever is done only the first time is done, and records."""
        if self._recorder is not None:
            call(*given)
            self._recorded[key] = self._recorder(partial(call, *given))

    def run(self, key: Hashable, call: Call) -> Outputs:
        """Replays what was recorded under the key; calls if nothing was."""
        return self._recorded.get(key, call)()
