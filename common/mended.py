"""Mends faults of gRPC's client (grpc.aio 1.83): `mended` two in calls with a stream of replies, `freed` one of others.

- A call that is refused while it is being written to gets the status INTERNAL, "Internal error from Core", as soon as a
  write fails, although the server's own status, with its details, is about to arrive.
- A read whose task is cancelled drops what core is about to hand to it: the message is never freed, 50 KB for each
  caller who leaves a stream (https://github.com/grpc/grpc/issues/43360).
- A call that has ended is kept by its own callback, a circle that only the garbage collector finds. With it are kept
  its replies, and through the contexts of its tasks whatever its caller was about.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

StreamCall = TypeVar("StreamCall", bound=Any)

LEFT = "who read has left"


class _Mended:
    """A call of gRPC's core that makes up no status of its own, and whose reads come to their end."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def set_internal_error(self, error: str) -> None:
        """Does nothing: core tells the server's status in its own time, after a failed write too."""

    async def receive_serialized_message(self) -> Any:
        """The next message, or EOF."""
        reading = asyncio.ensure_future(self._call.receive_serialized_message())
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            self._call.cancel(LEFT)  # core then ends the read, and frees what has arrived
            raise


def mended(call: StreamCall) -> StreamCall:
    """The same call. Only right after it was made."""
    call._cython_call = _Mended(call._cython_call)
    return call


def freed(call: Any) -> None:
    """Lets a call with one reply go that has come to its end, once nobody holds it. It can be asked nothing more."""
    del call._cython_call
