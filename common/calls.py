"""What is the same for every call: it has an id, a limit, a log line and metrics, and no exception's text leaves it."""

from __future__ import annotations

import asyncio
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from contextvars import ContextVar
from operator import methodcaller
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio

from common import metrics
from common.errors import ChorusError, Internal, ResourceExhausted, Unimplemented, abort, quoted
from common.logs import log_often, logger
from common.metadata import REQUEST_ID, Metadata, Priority, as_metadata, priority, request_id, said

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Identify = Callable[[Metadata, Callable[[], str]], str]
"""A call's metadata and peer (in gRPC's notation, if it is asked for) → the tenant it is for. Raises ChorusError."""

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

    def __init__(self, method: str, request_id: str, context: Context | None = None, metadata: Metadata = ()) -> None:
        """`metadata`: the caller's."""
        self.method = method
        self.metadata = metadata
        self.said = said(metadata)
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

    def set_trailers(self) -> None:
        """Gives gRPC what was said, all at once: it checks all of it each time."""
        if self._context is not None:
            self._context.set_trailing_metadata(tuple(self._trailers.items()))


_CALL: ContextVar[Call] = ContextVar("call")


def current_call() -> Call:
    """The call that the running task serves."""
    return _CALL.get()


class CallFrame(grpc.GenericRpcHandler):
    """What services are registered with, and what gRPC asks for a method: it gets it in its frame.

    An interceptor would do the same, but that gRPC awaits it for each call.
    """

    def __init__(self, identify: Identify, max_calls: int, debug: bool, keyed: tuple[str, ...] = ()) -> None:
        """`debug`: errors tell callers what went wrong inside. `keyed`: prefixes of plain services that need a key."""
        self._identify = identify
        self._keyed = keyed
        self._max_calls = max_calls
        self._debug = debug
        self._active = 0
        self._patience = _Patience()
        self._services: list[grpc.GenericRpcHandler] = []
        self._handlers: dict[str, Handler] = {}
        metrics.CALLS_ACTIVE.set_function(lambda: self._active)

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """As servers have it: registers services."""
        self._services.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """As servers have it. Does nothing: the methods are registered above already."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler:
        """A method in its frame, also one that does not exist."""
        method = handler_call_details.method
        if (known := self._handlers.get(method)) is not None:
            return known
        found = (service.service(handler_call_details) for service in self._services)
        handler = next((handler for handler in found if handler is not None), None)
        if handler is None:
            return self._framed(_unknown_method(method), UNKNOWN_METHOD, plain=False)
        plain = method.startswith(PLAIN_SERVICES)
        name = method if plain else method.lstrip("/")
        return self._handlers.setdefault(method, self._framed(handler, name, plain=plain))

    def _framed(self, handler: Any, name: str, *, plain: bool) -> Handler:
        """A method inside the frame, and with requests that are messages of its type.

        To gRPC all methods take a stream of requests: for a unary one it would itself wait, without calling anything
        of ours and without end, for the message of a caller who sends none.
        """
        run, receive = _runner(handler), _checked if handler.request_streaming else self._only
        begin, admit, close = (
            (_begin_plain, self._admit_plain, _close_plain) if plain else (self._begin, self._admit, self._close)
        )

        # One function, where context managers in one another would read as well: each took 2 µs of every call.
        async def answer(requests: AsyncIterator[Any], context: Context) -> Any:
            call = begin(name, context)
            try:
                admit(call, context)
                reply = await run(await receive(requests, context), context)
                call.set_trailers()
                return reply
            except ChorusError as error:
                await _refuse(call, context, error)
            except asyncio.CancelledError:
                remaining = context.time_remaining()
                call.code = "DEADLINE_EXCEEDED" if remaining is not None and remaining <= 0 else "CANCELLED"
                raise
            except Exception as error:
                # What is sent to a caller who has left can only fail, and may do so before gRPC says that it left.
                if isinstance(error, _SendError) or context.cancelled() or context.done():
                    call.code = "CANCELLED"
                    return None
                await _refuse(call, context, self._scrub(call, error))
            finally:
                close(call)

        kind = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        make: Callable[..., Handler] = kind
        return make(
            answer,
            request_deserializer=_careful(handler.request_deserializer),
            response_serializer=handler.response_serializer and methodcaller("SerializeToString"),
        )

    def _begin(self, method: str, context: Context) -> Call:
        """A call of ours: counted, limited, logged."""
        call = Call(method, "", context, as_metadata(context.invocation_metadata()))
        call.request_id = request_id(call.said)
        call.trail(REQUEST_ID, call.request_id)
        _CALL.set(call)
        self._active += 1
        return call

    def _admit(self, call: Call, context: Context) -> None:
        if self._active > self._max_calls:
            raise _no_room(self._max_calls)
        call.tenant = self._identify(call.metadata, context.peer)
        call.priority = priority(call.said)

    def _close(self, call: Call) -> None:
        self._active -= 1
        seconds = time.monotonic() - call.arrived
        metrics.CALLS.inc(call.method, call.code)
        metrics.CALL_SECONDS.observe(call.method, seconds)
        line = {
            "method": call.method,
            "code": call.code,
            "request_id": call.request_id,
            "tenant": call.tenant,
            "priority": call.priority,
            "ms": round(seconds * 1000, 1),
            **call.facts,
        }
        if call.reason is not None:
            line["reason"] = call.reason
        log_often("call", line)

    def _admit_plain(self, call: Call, context: Context) -> None:
        """A call of health or reflection."""
        if call.method.startswith(self._keyed):
            self._identify(call.metadata, context.peer)

    async def _only(self, requests: AsyncIterator[Any], context: Context) -> Any:
        """The message of a unary request. It is read from the context, which saves an iterator.

        Raises:
            Unimplemented: there is none; the code that gRPC's documentation names for a wrong number of messages.
            Internal: it cannot be parsed; likewise.
        """
        task = asyncio.current_task()
        assert task is not None
        self._patience.begin(task)
        try:
            request = await context.read()
        except asyncio.CancelledError as error:
            if error.args != (_LATE,) or task.uncancel():
                raise
            request = grpc.aio.EOF
        finally:
            self._patience.end(task)
        if request is grpc.aio.EOF:
            raise Unimplemented("this method takes one message, and none came", "MESSAGE_MISSING")
        return _no_garbage(request)

    async def idle(self) -> None:
        """Waits until no call of ours runs."""
        # A call that came at the last moment may not have begun yet: so never before a first wait.
        await asyncio.sleep(IDLE_POLL_SECONDS)
        while self._active:  # noqa: ASYNC110 (only while a process ends)
            await asyncio.sleep(IDLE_POLL_SECONDS)

    def _scrub(self, call: Call, error: Exception) -> Internal:
        error_id = uuid.uuid4().hex
        logger().error("internal error", error_id=error_id, method=call.method, exc_info=error)
        debug = "".join(traceback.format_exception(error)) if self._debug else None
        return Internal.of(error_id, debug)


def _no_room(calls: int) -> ResourceExhausted:
    return ResourceExhausted(
        f"{calls} calls run here already; try again in a second",
        "TOO_MANY_CALLS",
        retry_after=1.0,
        quota="concurrent_calls",
    )


def _begin_plain(method: str, context: Context) -> Call:
    return Call(method, "", metadata=as_metadata(context.invocation_metadata()))


def _close_plain(call: Call) -> None:
    """Does nothing: it was not counted."""


def _runner(handler: Any) -> Callable[[Any, Context], Awaitable[Any]]:
    """A method as a coroutine, which sends a stream of replies by itself."""
    unary: Callable[[Any, Context], Awaitable[Any]] | None = handler.unary_unary or handler.stream_unary
    stream: Callable[[Any, Context], Any] | None = handler.unary_stream or handler.stream_stream
    if unary is not None:
        return unary

    async def send(request: Any, context: Context) -> None:
        assert stream is not None
        await _send_all(stream(request, context), context)

    return send


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


async def _refuse(call: Call, context: Context, error: ChorusError) -> NoReturn:
    """Ends a call with an error; quietly where its caller has left, who can no longer be told."""
    call.code, call.reason = error.code.name, error.reason
    call.set_trailers()
    try:
        await abort(context, error)
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None


_LATE = "no message came"
_GARBAGE = object()
"""Stands for a request whose bytes are no message of its type."""


def _careful(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    def careful(data: bytes) -> Any:
        try:
            return data if deserialize is None else deserialize(data)
        except Exception:
            return _GARBAGE

    return careful


class _Patience:
    """Ends the waiting for messages that do not come, with one timer for all: they may all take equally long.

    With a timer of its own each call sets one, and next to none needs it.
    """

    def __init__(self) -> None:
        self._since: dict[asyncio.Task[Any], float] = {}
        """Who waits, and since when: the first has waited longest."""
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, task: asyncio.Task[Any]) -> None:
        """Cancels a task when it has waited too long, unless `end` comes first."""
        self._since[task] = time.monotonic()
        if self._timer is None:
            self._look()

    def end(self, task: asyncio.Task[Any]) -> None:
        """It does not wait any more."""
        self._since.pop(task, None)

    def _look(self) -> None:
        self._timer = None
        while self._since:
            task, since = next(iter(self._since.items()))
            left = since + RECEIVE_SECONDS - time.monotonic()
            if left > 0:
                self._timer = asyncio.get_running_loop().call_later(left, self._look)
                return
            del self._since[task]
            task.cancel(_LATE)


async def _checked(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
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
