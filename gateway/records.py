"""What came of a keyed call: the very messages that its caller got, and how it failed if it did."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grpc
from google.rpc import status_pb2

from common.errors import ChorusError, Relayed
from common.objects import Objects

INLINE_BYTES = 16 * 1024
"""Up to this a record lies in the ledger itself; beyond it, in the object store."""
MOST_BYTES = 64 * 1024 * 1024
"""What is larger is not kept: a retry speaks it again."""

KEPT_REASONS = frozenset({"NOTHING_SPOKEN", "AUDIO_TOO_LONG", "REPLY_TOO_LARGE"})
"""Failures that a retry can only repeat, found by speaking."""

_INLINE, _POINTER = b"i", b"p"
_MESSAGE, _ERROR = b"m", b"e"
_FRAME = struct.Struct("!cI")


@dataclass(frozen=True, slots=True)
class Record:
    """Messages as bytes, in order, and an error after them or none."""

    messages: Sequence[bytes]
    error: ChorusError | None = None

    def to_bytes(self) -> bytes:
        """As it is kept."""
        frames = [_framed(_MESSAGE, message) for message in self.messages]
        if self.error is not None:
            frames.append(_framed(_ERROR, self.error.status().SerializeToString()))
        return b"".join(frames)

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """As it was."""
        messages, error = [], None
        for kind, body in _frames(data):
            if kind == _MESSAGE:
                messages.append(body)
            else:
                error = _error(status_pb2.Status.FromString(body))
        return cls(messages, error)


async def put_record(objects: Objects, leaf: str, data: bytes) -> bytes:
    """Puts a record where it belongs, and returns what the ledger keeps of it. `leaf`: of a name that no other has.

    Raises:
        StoreUnavailable: the object store does not answer.
    """
    if len(data) <= INLINE_BYTES:
        return _INLINE + data
    name = objects.name("claims", leaf)
    await objects.put(name, data)
    return _POINTER + name.encode()


async def drop_record(objects: Objects, kept: bytes) -> None:
    """Forgets a record that the ledger does not keep.

    Raises:
        StoreUnavailable: it may still be there, until it is swept.
    """
    if kept[:1] == _POINTER:
        await objects.delete(kept[1:].decode())


async def get_record(objects: Objects, kept: bytes) -> Record | None:
    """The record of which the ledger keeps so much; None: it is gone.

    Raises:
        StoreUnavailable: the object store does not answer.
    """
    if kept[:1] == _INLINE:
        return Record.from_bytes(kept[1:])
    data = await objects.get(kept[1:].decode())
    return None if data is None else Record.from_bytes(data)


def is_kept(error: BaseException) -> bool:
    """Whether a failure is what a retry is told too."""
    return isinstance(error, ChorusError) and error.reason in KEPT_REASONS


def _error(status: status_pb2.Status) -> ChorusError:
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    return Relayed(code, status)


def _framed(kind: bytes, body: bytes) -> bytes:
    return _FRAME.pack(kind, len(body)) + body


def _frames(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at < len(data):
        kind, length = _FRAME.unpack_from(data, at)
        at += _FRAME.size
        yield kind, data[at : at + length]
        at += length
