"""What is the same for every call: it has an id, a limit, a log line and metrics, and no exception's text leaves it."""

from __future__ import annotations

import asyncio
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio

from common import metrics
from common.errors import ChorusError, Internal, ResourceExhausted, Unimplemented, abort, quoted
from common.logs import logger
from common.metadata import REQUEST_ID, Metadata, Priority, as_metadata, priority, request_id

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Identify = Callable[[Metadata, str], str]
"""A call's metadata and peer (in gRPC's notation) → the tenant it is for. Raises ChorusError."""

PLAIN_SERVICES = ("/grpc.health.", "/grpc.reflection.")
"""Neither counted, limited nor logged."""

UNKNOWN_METHOD = "unknown"
"""What metrics and logs call every method that there is not: its name is its caller's, and there may be any number."""


RECEIVE_SECONDS = 20.0
"""How long the message of a unary call may take."""
IDLE_POLL_SECONDS = 0.05


class _SendError(Exception):
    """A reply could not be sent: its caller has left."""


class Call:
    """A call that runs: what its log line will say."""

    def __init__(self, method: str, request_id: str, context: Context | None = None) -> None:
        self.method = method
        self._context = context
        self._trailers: dict[str, str | bytes] = {}
        self.tenant = ""
        self.priority: Priority = "interactive"
        self.request_id = request_id
        self.arrived = time.monotonic()
        self.facts: dict[str, Any] = {}
        self.code = "OK"
        self.reason: str | None = None

    def trail(self, name: str, value: str | bytes) -> None:
        """Says something in the call's trailing metadata, whether it ends well or not."""
        self._trailers[name] = value
        if self._context is not None:
            self._context.set_trailing_metadata(tuple(self._trailers.items()))


_CALL: ContextVar[Call] = ContextVar("call")


def current_call() -> Call:
    """The call that the running task serves."""
    return _CALL.get()


class CallFrame(grpc.aio.ServerInterceptor):
    """The outermost interceptor."""

    def __init__(self, identify: Identify, max_calls: int, debug: bool, keyed: tuple[str, ...] = ()) -> None:
        """`debug`: errors tell callers what went wrong inside. `keyed`: prefixes of plain services that need a key."""
        self._identify = identify
        self._keyed = keyed
        self._max_calls = max_calls
        self._debug = debug
        self._active = 0
        self._handlers: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Puts the frame round a method, also round one that does not exist."""
        method = handler_call_details.method
        if (known := self._handlers.get(method)) is not None:
            return known
        handler = await continuation(handler_call_details)
        if handler is None:
            return _wrapped(_unknown_method(method), partial(self._frame, UNKNOWN_METHOD))
        plain = method.startswith(PLAIN_SERVICES)
        frame = partial(self._plain, method) if plain else partial(self._frame, method.lstrip("/"))
        return self._handlers.setdefault(method, _wrapped(handler, frame))

    @asynccontextmanager
    async def _frame(self, method: str, context: Context) -> AsyncIterator[None]:
        """A call of ours: counted, limited, logged."""
        metadata = as_metadata(context.invocation_metadata())
        call = Call(method, request_id(metadata), context)
        _CALL.set(call)
        call.trail(REQUEST_ID, call.request_id)
        self._active += 1
        metrics.CALLS_ACTIVE.inc()
        try:
            async with self._told(call, context):
                self._check_room()
                call.tenant = self._identify(metadata, context.peer())
                call.priority = priority(metadata)
                yield
        finally:
            self._active -= 1
            _close(call)

    @asynccontextmanager
    async def _plain(self, method: str, context: Context) -> AsyncIterator[None]:
        """A call of health or reflection."""
        async with self._told(Call(method, ""), context):
            if method.startswith(self._keyed):
                self._identify(as_metadata(context.invocation_metadata()), context.peer())
            yield

    @asynccontextmanager
    async def _told(self, call: Call, context: Context) -> AsyncIterator[None]:
        """Tells a caller what went wrong, and no more than it may know."""
        try:
            yield
        except ChorusError as error:
            call.code, call.reason = error.code.name, error.reason
            await _end(context, error)
        except asyncio.CancelledError:
            remaining = context.time_remaining()
            call.code = "DEADLINE_EXCEEDED" if remaining is not None and remaining <= 0 else "CANCELLED"
            raise
        except Exception as error:
            # What is sent to a caller who has left can only fail, and may do so before gRPC says that it left.
            if isinstance(error, _SendError) or context.cancelled() or context.done():
                call.code = "CANCELLED"
                return
            scrubbed = self._scrub(call, error)
            call.code, call.reason = scrubbed.code.name, scrubbed.reason
            await _end(context, scrubbed)

    async def idle(self) -> None:
        """Waits until no call of ours runs."""
        # A call that came at the last moment may not have begun yet: so never before a first wait.
        await asyncio.sleep(IDLE_POLL_SECONDS)
        while self._active:  # noqa: ASYNC110 (only while a process ends)
            await asyncio.sleep(IDLE_POLL_SECONDS)

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


def _wrapped(handler: Any, frame: Callable[[Context], AbstractAsyncContextManager[None]]) -> Handler:
    """A method inside a frame, and with requests that are messages of its type.

    To gRPC all methods take a stream of requests: for a unary one it would itself wait, without calling anything
    of ours and without end, for the message of a caller who sends none.
    """
    unary: Callable[[Any, Context], Awaitable[Any]] | None = handler.unary_unary or handler.stream_unary
    stream: Callable[[Any, Context], Any] | None = handler.unary_stream or handler.stream_stream
    receive = _checked if handler.request_streaming else _only

    async def answer(requests: AsyncIterator[Any], context: Context) -> Any:
        assert unary is not None
        async with frame(context):
            return await unary(await receive(requests), context)

    async def answer_many(requests: AsyncIterator[Any], context: Context) -> None:
        assert stream is not None
        async with frame(context):
            await _send_all(stream(await receive(requests), context), context)

    kind = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    make: Callable[..., Handler] = kind
    return make(
        answer_many if handler.response_streaming else answer,
        request_deserializer=_careful(handler.request_deserializer),
        response_serializer=handler.response_serializer,
    )


async def _send_all(replies: AsyncGenerator[Any, None] | Awaitable[None], context: Context) -> None:
    """Sends what a method yields; one that sends for itself is only waited for."""
    if isinstance(replies, Awaitable):
        await replies
        return
    # Closed here and now when the caller leaves, not when the garbage collector comes by: its place is free at once.
    async with aclosing(replies):
        async for message in replies:
            try:
                await context.write(message)
            except grpc.aio.InternalError as error:
                raise _SendError from error


async def _end(context: Context, error: ChorusError) -> NoReturn:
    """Ends a call with an error; quietly where its caller has left, who can no longer be told."""
    try:
        await abort(context, error)
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None


def _close(call: Call) -> None:
    seconds = time.monotonic() - call.arrived
    metrics.CALLS_ACTIVE.dec()
    metrics.call_counter(call.method, call.code).inc()
    metrics.call_seconds(call.method).observe(seconds)
    reason = {} if call.reason is None else {"reason": call.reason}
    logger().info(
        "call",
        method=call.method,
        code=call.code,
        request_id=call.request_id,
        tenant=call.tenant,
        priority=call.priority,
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


async def _only(requests: AsyncIterator[Any]) -> Any:
    """The message of a unary request.

    Raises:
        Unimplemented: there is none; the code that gRPC's documentation names for a wrong number of messages.
        Internal: it cannot be parsed; likewise.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(RECEIVE_SECONDS):
            async for request in requests:
                return _no_garbage(request)
    raise Unimplemented("this method takes one message, and none came", "MESSAGE_MISSING")


async def _checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The messages of a streamed request, each checked as it comes."""

    async def check() -> AsyncIterator[Any]:
        async for request in requests:
            yield _no_garbage(request)

    return check()


def _no_garbage(request: Any) -> Any:
    if request is _GARBAGE:
        raise Internal("the request's bytes are no message of the method's type", "MALFORMED_MESSAGE")
    return request


def _unknown_method(method: str) -> Handler:
    async def refuse(requests: AsyncIterator[bytes], context: Context) -> bytes:
        message = f"there is no method {quoted(method)}; server reflection lists what there is"
        raise Unimplemented(message, "METHOD_NOT_FOUND")

    # Of a stream nothing has to be read before it is refused.
    return grpc.stream_unary_rpc_method_handler(refuse)
