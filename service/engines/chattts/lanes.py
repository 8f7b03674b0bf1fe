"""Work that is handed to the device and not waited for.

On a GPU a lane is a CUDA stream: what is put on one lane is done in order, and two lanes go on side by side. On a CPU
everything is done when it is called, and there is nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Lane:
    """A queue of work.

    Args:
        device: that does it.
        urgent: before that of other lanes, where both wait.
    """

    def __init__(self, device: torch.device, *, urgent: bool = False) -> None:
        self._stream = torch.cuda.Stream(device, priority=-int(urgent)) if device.type == "cuda" else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What is called inside goes on this lane. So does the memory that is allocated: free it as if here."""
        with torch.cuda.stream(self._stream):  # nothing, for None
            yield

    def follow(self, other: Lane) -> None:
        """What comes now waits until the other has done what it has."""
        if self._stream is not None and other._stream is not None:
            self._stream.wait_stream(other._stream)

    def wait(self) -> None:
        """Until it has done all."""
        if self._stream is not None:
            self._stream.synchronize()


class Fetched:
    """A copy on its way from the device to the host, on the current lane."""

    def __init__(self, tensor: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._host = tensor
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    def numpy(self) -> NDArray[np.generic]:
        """Waits for it. The memory that it came through is free for others then."""
        if self._done is None:
            return self._host.numpy()
        self._done.synchronize()
        return self._host.numpy().copy()


def upload(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """To the device, which is not waited for."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
