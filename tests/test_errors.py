"""The family of errors: each has its code, one ErrorInfo, and what a program needs to act."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2 as details_pb2
from google.rpc import status_pb2
from grpc.aio import Metadata
from grpc_status import rpc_status

from batcher import errors as batcher_errors
from common import errors
from common.errors import ChorusError, Internal, InvalidArgument, Relayed, ResourceExhausted, Violation, quoted
from gateway import upstream
from service.speaking import JITTER, told

SUBCLASSES = [kind for kind in ChorusError.__subclasses__() if kind is not Relayed]


def unpacked(status: status_pb2.Status) -> dict[str, Any]:
    """An error's details by the names of their types; each may be there once."""
    found: dict[str, Any] = {}
    for packed in status.details:
        name = packed.type_url.rpartition("google.rpc.")[2]
        assert name not in found
        found[name] = getattr(details_pb2, name)()
        assert packed.Unpack(found[name])
    return found


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_each_error_is_the_status_of_its_name(kind: type[ChorusError]) -> None:
    error = kind("what happened", "SOME_REASON", metadata={"a": "b"})
    assert error.code.name == "".join("_" * c.isupper() + c for c in kind.__name__).lstrip("_").upper()
    status = error.status()
    assert (status.code, status.message) == (error.code.value[0], "what happened")
    assert unpacked(status) == {
        "ErrorInfo": details_pb2.ErrorInfo(reason="SOME_REASON", domain="chorus", metadata={"a": "b"})
    }
    assert str(error) == "SOME_REASON: what happened"


def test_faulty_fields() -> None:
    error = InvalidArgument.of([Violation("text", "is empty"), Violation("voice", "is not known")])
    assert error.message == "text: is empty; voice: is not known"
    fields = unpacked(error.status())["BadRequest"].field_violations
    assert [(field.field, field.description) for field in fields] == [("text", "is empty"), ("voice", "is not known")]


@pytest.mark.parametrize(("seconds", "milliseconds"), [(1.0, 1000), (0.0001, 1), (2.0004, 2001), (0.0, 0)])
def test_delays_are_rounded_up(seconds: float, milliseconds: int) -> None:
    error = ResourceExhausted("busy", "BUSY", retry_after=seconds, quota="calls")
    found = unpacked(error.status())
    assert error.retry_after_ms == found["RetryInfo"].retry_delay.ToMilliseconds() == milliseconds
    (violation,) = found["QuotaFailure"].violations
    assert (violation.subject, violation.description) == ("calls", "busy")


def test_an_internal_error_says_only_its_id() -> None:
    assert set(unpacked(Internal.of("id7").status())) == {"ErrorInfo"}
    found = unpacked(Internal.of("id7", debug="x" * 100_000 + "the end").status())
    assert found["ErrorInfo"].metadata == {"error_id": "id7"}
    assert found["DebugInfo"].detail.endswith("the end")


def test_a_backends_error_passes_as_it_is() -> None:
    original = ResourceExhausted("busy", "BUSY", retry_after=0.25, quota="calls").status()
    error = Relayed(grpc.StatusCode.RESOURCE_EXHAUSTED, original)
    assert error.status() == original
    assert (error.message, error.reason, error.retry_after_ms) == ("busy", "BUSY", 250)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("hi", "'hi'"),
        ("a\n\0", r"'a\n\x00'"),
        ("x" * 81, f"'{'x' * 80}…'"),
        ("\U000e0001" * 99, "'" + r"\U000e0001" * 80 + "…'"),
    ],
)
def test_a_callers_words_are_cut_and_printable(words: str, shown: str) -> None:
    assert quoted(words) == shown


BATCHER_ERRORS = [
    batcher_errors.QueueFullError(2.0) if kind is batcher_errors.QueueFullError else kind("inside")
    for kind in batcher_errors.BatcherError.__subclasses__()
]


@pytest.mark.parametrize("error", BATCHER_ERRORS, ids=lambda error: type(error).__name__)
def test_every_error_of_the_batcher_has_words_for_the_caller(error: batcher_errors.BatcherError) -> None:
    said = told(error)
    assert "inside" not in said.message
    needs_delay = said.code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
    assert (said.retry_after is not None) == needs_delay
    assert (said.quota is not None) == isinstance(said, errors.ResourceExhausted)


def test_a_full_queue_spreads_its_callers() -> None:
    delays = {told(batcher_errors.QueueFullError(2.0)).retry_after for _ in range(50)}
    assert len(delays) > 1
    assert all(delay is not None and 2.0 <= delay <= 2.0 * (1 + JITTER) for delay in delays)


@pytest.mark.parametrize("agreed", [True, False])
def test_a_backend_whose_error_and_trailers_disagree_is_told_by_its_code(agreed: bool) -> None:
    """As when the deadline passes here while its error is on the way."""
    status = errors.DeadlineExceeded("the deadline passed", "DEADLINE_EXCEEDED").status()
    trailers = Metadata(*rpc_status.to_status(status).trailing_metadata)
    details = "the deadline passed" if agreed else "Stream removed (Deadline Exceeded)"
    error = grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, Metadata(), trailers, details)
    of_backend = upstream.told(error)
    assert isinstance(of_backend, Relayed) == agreed
    assert (of_backend.code, of_backend.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
