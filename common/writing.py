"""Mends a fault of gRPC's client: a call that is refused while it is being written to ends as its server said.

grpc.aio 1.83 gives such a call the status INTERNAL, "Internal error from Core", as soon as a write fails, although
the server's own status, with its details, is about to arrive.
"""

from __future__ import annotations

from typing import Any, TypeVar

StreamCall = TypeVar("StreamCall", bound=Any)


class _ServersWord:
    """A call of gRPC's core that makes up no status of its own."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def set_internal_error(self, error: str) -> None:
        """Does nothing: core tells the server's status in its own time, after a failed write too."""


def with_servers_word(call: StreamCall) -> StreamCall:
    """The same call, mended. Only right after it was made."""
    call._cython_call = _ServersWord(call._cython_call)
    return call
