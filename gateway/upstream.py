"""What a caller is told when a backend's call failed."""

from __future__ import annotations

from typing import cast

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from common.errors import (
    DOMAIN,
    ChorusError,
    DeadlineExceeded,
    OutOfRange,
    Relayed,
    Unavailable,
)

RETRY_SECONDS = 1.0


def told(error: grpc.aio.AioRpcError) -> ChorusError:
    """A backend's own error as it is; one that gRPC made, such as a broken connection, in our words."""
    status = _status(error)
    if status is not None and _is_ours(status):
        return Relayed(error.code(), status)
    match error.code():
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            return Unavailable("no backend could answer; try again", "BACKEND_UNAVAILABLE", retry_after=RETRY_SECONDS)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded("the deadline passed", "DEADLINE_EXCEEDED")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return OutOfRange("the backend's reply was larger than a message may be", "REPLY_TOO_LARGE")
    # The caller's frame logs it and tells no more than an id.
    raise error


def _status(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    """What a backend's trailers say of its error. Where a deadline passes as they arrive, gRPC says something else."""
    try:
        return rpc_status.from_call(cast("grpc.Call", error))
    except ValueError:  # the two do not agree
        return None


def _is_ours(status: status_pb2.Status) -> bool:
    info = error_details_pb2.ErrorInfo()
    return any(detail.Unpack(info) and info.domain == DOMAIN for detail in status.details)
