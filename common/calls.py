"""What is the same for every call: it has an id, a limit, a log line and metrics, and no exception's text leaves it."""

from __future__ import annotations

import asyncio
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio

from common import metrics
from common.errors import ChorusError, Internal, ResourceExhausted, Unimplemented, abort, quoted
from common.logs import logger
from common.metadata import REQUEST_ID, Metadata, as_metadata, request_id

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Identify = Callable[[Metadata, str], str]
"""A call's metadata and peer (in gRPC's notation) → the tenant it is for. Raises ChorusError."""

PLAIN_SERVICES = ("/grpc.health.", "/grpc.reflection.")
"""Neither counted, limited nor logged."""

UNKNOWN_METHOD = "unknown"
"""What metrics and logs call every method that there is not: its name is its caller's, and there may be any number."""


class Call:
    """A call that runs: what its log line will say."""

    def __init__(self, method: str, request_id: str) -> None:
        self.method = method
        self.tenant = ""
        self.request_id = request_id
        self.arrived = time.monotonic()
        self.facts: dict[str, Any] = {}
        self.error: ChorusError | None = None


_CALL: ContextVar[Call] = ContextVar("call")


def current_call() -> Call:
    """The call that the running task serves."""
    return _CALL.get()


class CallFrame(grpc.aio.ServerInterceptor):
    """The outermost interceptor."""

    def __init__(self, identify: Identify, max_calls: int, debug: bool) -> None:
        """`debug`: errors tell callers what went wrong inside."""
        self._identify = identify
        self._max_calls = max_calls
        self._debug = debug
        self._active = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Puts the frame round a method, also round one that does not exist."""
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None:
            return self._framed(UNKNOWN_METHOD, _unknown_method(method))
        return handler if method.startswith(PLAIN_SERVICES) else self._framed(method.lstrip("/"), handler)

    def _framed(self, method: str, handler: Any) -> Handler:
        unary: Callable[[Any, Context], Awaitable[Any]] | None = handler.unary_unary or handler.stream_unary
        stream: Callable[[Any, Context], AsyncGenerator[Any, None]] | None = (
            handler.unary_stream or handler.stream_stream
        )

        async def answer(request: Any, context: Context) -> Any:
            async with self._frame(method, context):
                assert unary is not None
                return await unary(_checked(request), context)

        async def answer_many(request: Any, context: Context) -> None:
            assert stream is not None
            async with self._frame(method, context), aclosing(stream(_checked(request), context)) as messages:
                async for message in messages:
                    await context.write(message)

        kind = ("stream" if handler.request_streaming else "unary") + (
            "_stream_rpc_method_handler" if handler.response_streaming else "_unary_rpc_method_handler"
        )
        return cast(
            "Handler",
            getattr(grpc, kind)(
                answer_many if handler.response_streaming else answer,
                request_deserializer=_careful(handler.request_deserializer),
                response_serializer=handler.response_serializer,
            ),
        )

    @asynccontextmanager
    async def _frame(self, method: str, context: Context) -> AsyncIterator[None]:
        metadata = as_metadata(context.invocation_metadata())
        call = Call(method, request_id(metadata))
        _CALL.set(call)
        context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
        self._active += 1
        metrics.CALLS_ACTIVE.inc()
        code = "OK"
        try:
            self._check_room()
            call.tenant = self._identify(metadata, context.peer())
            yield
        except ChorusError as error:
            code = error.code.name
            call.error = error
            await abort(context, error)
        except asyncio.CancelledError:
            remaining = context.time_remaining()
            code = "DEADLINE_EXCEEDED" if remaining is not None and remaining <= 0 else "CANCELLED"
            raise
        except Exception as error:
            code = "INTERNAL"
            call.error = self._scrub(call, error)
            await abort(context, call.error)
        finally:
            self._active -= 1
            _close(call, code)

    def _check_room(self) -> None:
        if self._active > self._max_calls:
            raise ResourceExhausted(
                f"{self._max_calls} calls run here already; try again in a second",
                "TOO_MANY_CALLS",
                retry_after=1.0,
                quota="concurrent_calls",
            )

    def _scrub(self, call: Call, error: Exception) -> Internal:
        error_id = uuid.uuid4().hex
        logger().error("internal error", error_id=error_id, method=call.method, exc_info=error)
        debug = "".join(traceback.format_exception(error)) if self._debug else None
        return Internal.of(error_id, debug)


def _close(call: Call, code: str) -> None:
    seconds = time.monotonic() - call.arrived
    metrics.CALLS_ACTIVE.dec()
    metrics.CALLS.labels(call.method, code).inc()
    metrics.CALL_SECONDS.labels(call.method).observe(seconds)
    reason = {} if call.error is None else {"reason": call.error.reason}
    logger().info(
        "call",
        method=call.method,
        code=code,
        request_id=call.request_id,
        tenant=call.tenant,
        ms=round(seconds * 1000, 1),
        **reason,
        **call.facts,
    )


_GARBAGE = object()
"""Stands for a request whose bytes are no message of its type."""


def _careful(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    def careful(data: bytes) -> Any:
        try:
            return data if deserialize is None else deserialize(data)
        except Exception:
            return _GARBAGE

    return careful


def _checked(request: Any) -> Any:
    """A request, or an iterator of requests, that is no garbage.

    Raises:
        Internal: that is what gRPC's own documentation names for a message that cannot be parsed.
    """
    if request is _GARBAGE:
        raise Internal("the request's bytes are no message of the method's type", "MALFORMED_MESSAGE")
    return _each_checked(request) if isinstance(request, AsyncIterator) else request


async def _each_checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)


def _unknown_method(method: str) -> Handler:
    async def refuse(request: bytes, context: Context) -> bytes:
        message = f"there is no method {quoted(method)}; server reflection lists what there is"
        raise Unimplemented(message, "METHOD_NOT_FOUND")

    return grpc.unary_unary_rpc_method_handler(refuse)
