"""Every way in which Chorus fails, and how a caller is told.

    ChorusError
    ├── InvalidArgument       the request is wrong: all its faulty fields at once
    ├── NotFound              what was named does not exist
    ├── OutOfRange            it turned out larger than what a reply holds
    ├── PermissionDenied      the caller may not say this
    ├── Unauthenticated       nobody knows who calls
    ├── ResourceExhausted     busy: try again after a delay
    ├── Aborted               it runs already, elsewhere
    ├── Unavailable           gone or going: try again
    ├── DeadlineExceeded      the deadline has passed, or cannot be met
    ├── Cancelled             the caller went away
    ├── Unimplemented         no such call here
    ├── Internal              our fault: an id for the log, and nothing else
    └── Relayed               a backend's error, in a gateway
    StartupError              a process cannot start: for the person who started it

Each gRPC error has exactly one ErrorInfo, with domain `chorus`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, Self

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "chorus"
PUSHBACK = "grpc-retry-pushback-ms"
"""Trailer that tells gRPC's own retries how long to wait."""
FLIGHT_ELSEWHERE = "FLIGHT_ELSEWHERE"
RETRY_AFTER = "retry-after"
"""The same for people and for what stands between, in whole seconds."""

# An error travels in headers, twice: as its message and in its details. Clients take 8 KiB of them in all.
QUOTED_CHARACTERS = 80
DEBUG_BYTES = 3072


class StartupError(Exception):
    """A process cannot start. The text tells a person what to do."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A faulty field and what is wrong with it."""

    field: str
    description: str


def quoted(words: str) -> str:
    """A caller's own words as a message says them: cut short, and nothing in them but what can be printed."""
    return repr(words if len(words) <= QUOTED_CHARACTERS else words[:QUOTED_CHARACTERS] + "…")


class ChorusError(Exception):
    """Something that a caller is told."""

    code: grpc.StatusCode

    def __init__(
        self,
        message: str,
        reason: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
        violations: Sequence[Violation] = (),
        quota: str | None = None,
        debug: str | None = None,
    ) -> None:
        """Says what a caller is told.

        Args:
            message: for people: what happened, and what to do next.
            reason: for programs: UPPER_SNAKE_CASE, never changed once released.
            metadata: more for programs, in ErrorInfo.
            retry_after: seconds.
            violations: the faulty fields, for BadRequest.
            quota: the limit that was met, for QuotaFailure.
            debug: for DebugInfo, its end if it is long; set only where CHORUS_DEBUG is.
        """
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = metadata or {}
        self.retry_after = retry_after
        self.violations = violations
        self.quota = quota
        self.debug = debug

    def __str__(self) -> str:
        """The message, with its reason."""
        return f"{self.reason}: {self.message}"

    def __copy__(self) -> Self:
        """The same, without a traceback: for somebody else to raise."""
        other = type(self).__new__(type(self), *self.args)
        other.__dict__.update(self.__dict__)
        return other

    def details(self) -> list[Message]:
        """The google.rpc messages that say the same to a program."""
        details: list[Message] = [
            error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=dict(self.metadata))
        ]
        if self.violations:
            fields = [
                error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
                for v in self.violations
            ]
            details.append(error_details_pb2.BadRequest(field_violations=fields))
        if self.quota is not None:
            violation = error_details_pb2.QuotaFailure.Violation(subject=self.quota, description=self.message)
            details.append(error_details_pb2.QuotaFailure(violations=[violation]))
        if self.retry_after is not None:
            delay = Duration()
            delay.FromMilliseconds(self.retry_after_ms)
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        if self.debug is not None:
            end = self.debug.encode()[-DEBUG_BYTES:].decode(errors="ignore")
            details.append(error_details_pb2.DebugInfo(detail=end))
        return details

    @property
    def retry_after_ms(self) -> int:
        """The delay in whole milliseconds, rounded up."""
        return math.ceil((self.retry_after or 0.0) * 1000)

    def status(self) -> status_pb2.Status:
        """The error as a google.rpc.Status."""
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in self.details():
            packed = Any()
            packed.Pack(detail)
            status.details.append(packed)
        return status


class InvalidArgument(ChorusError):
    """The request is wrong."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    @classmethod
    def of(cls, violations: Sequence[Violation], reason: str = "INVALID_FIELDS") -> InvalidArgument:
        """Names all faulty fields."""
        message = "; ".join(f"{v.field}: {v.description}" for v in violations)
        return cls(message, reason, violations=violations)


class NotFound(ChorusError):
    """What was named does not exist."""

    code = grpc.StatusCode.NOT_FOUND


class OutOfRange(ChorusError):
    """It turned out larger than what a reply holds."""

    code = grpc.StatusCode.OUT_OF_RANGE


class PermissionDenied(ChorusError):
    """The caller may not say this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Unauthenticated(ChorusError):
    """Nobody knows who calls."""

    code = grpc.StatusCode.UNAUTHENTICATED


class Aborted(ChorusError):
    """It runs already, elsewhere. Always with `retry_after`."""

    code = grpc.StatusCode.ABORTED


class ResourceExhausted(ChorusError):
    """Busy. Always with `retry_after` and `quota`."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(ChorusError):
    """Gone or going. Always with `retry_after`."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(ChorusError):
    """The deadline has passed, or cannot be met."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(ChorusError):
    """The caller went away."""

    code = grpc.StatusCode.CANCELLED


class Unimplemented(ChorusError):
    """No such call here."""

    code = grpc.StatusCode.UNIMPLEMENTED


class Internal(ChorusError):
    """Our fault."""

    code = grpc.StatusCode.INTERNAL

    @classmethod
    def of(cls, error_id: str, debug: str | None = None) -> Internal:
        """Says no more than an id that finds the rest in the log."""
        message = f"an internal error; the server's log has it under {error_id}"
        return cls(message, "INTERNAL", metadata={"error_id": error_id}, debug=debug)


class Relayed(ChorusError):
    """A backend's error, passed on as it came, with all its details."""

    def __init__(self, code: grpc.StatusCode, status: status_pb2.Status) -> None:
        """`status`: has an ErrorInfo of ours."""
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        retry_after = None
        for detail in status.details:
            detail.Unpack(info)
            if detail.Unpack(retry):
                retry_after = retry.retry_delay.ToMilliseconds() / 1000
        super().__init__(status.message, info.reason, metadata=dict(info.metadata), retry_after=retry_after)
        self.code = code
        self._status = status

    def status(self) -> status_pb2.Status:
        """The backend's."""
        return self._status


async def abort(context: grpc.aio.ServicerContext[Message, Message], error: ChorusError) -> NoReturn:
    """Ends a call with an error and its details; one that asks for patience tells gRPC's own retries too."""
    trailers = [*(context.trailing_metadata() or ()), *(rpc_status.to_status(error.status()).trailing_metadata or ())]
    if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_after is not None:
        trailers.append((PUSHBACK, str(error.retry_after_ms)))
        trailers.append((RETRY_AFTER, str(math.ceil(error.retry_after))))
    await context.abort(error.code, error.message, tuple(trailers))
