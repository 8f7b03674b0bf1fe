"""The main path of a call through the gateway: identify → admit → claim → speak, and on to a backend."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NamedTuple, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message
from pydantic import SecretStr

from common.calls import Call, Context, current_call
from common.errors import DeadlineExceeded
from common.mended import freed, mended
from common.metadata import (
    INTERNAL_DEADLINE,
    INTERNAL_SECRET,
    INTERNAL_TENANT,
    PRIORITY,
    REQUEST_ID,
    Metadata,
    as_metadata,
)
from common.settings import Settings
from gateway.claims import Keyed
from gateway.idempotency import Idempotency, fingerprint, read_key
from gateway.limiter import Admission, Limiter
from gateway.tenants import Tenant, Tenants
from gateway.upstream import told

Method: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[Any, Any]"
StreamMethod: TypeAlias = "grpc.aio.UnaryStreamMultiCallable[Any, Any] | grpc.aio.StreamStreamMultiCallable[Any, Any]"
Reply = TypeVar("Reply", bound=Any)


class Turn(NamedTuple):
    """A call that has its turn: what its backends are told, and how long they have."""

    call: Call
    tenant: Tenant
    admission: Admission
    deadline: float
    """On the monotonic clock, in seconds."""
    secret: SecretStr | None
    """What proves to backends that this is a gateway."""
    more: Metadata = ()
    """What backends are told besides."""

    @property
    def metadata(self) -> Metadata:
        """What a backend is told of the caller. Nothing of the caller's own metadata passes."""
        call = self.call
        haste = () if call.priority == "interactive" else ((PRIORITY, call.priority),)
        return ((REQUEST_ID, call.request_id), *internal_metadata(self.secret, call.tenant), *haste, *self.more)

    @property
    def timeout(self) -> float:
        """Seconds that are left.

        Raises:
            DeadlineExceeded: none are.
        """
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the deadline passed", "DEADLINE_EXCEEDED")
        return left

    def shared(self, most_seconds: float) -> Turn:
        """The same turn for a call that others may join, who may wait longer: they end it when nobody waits."""
        patience = (INTERNAL_DEADLINE, str(round(self.timeout * 1000)))
        return self._replace(deadline=time.monotonic() + most_seconds, more=(*self.more, patience))

    def saying(self, *pairs: tuple[str, str]) -> Turn:
        """The same turn, with more metadata."""
        return self._replace(more=(*self.more, *pairs))


class Pipeline:
    """What is the same for every call, whatever it asks for."""

    def __init__(self, settings: Settings, tenants: Tenants, limiter: Limiter, idempotency: Idempotency) -> None:
        self._settings = settings
        self._tenants = tenants
        self._limiter = limiter
        self._idempotency = idempotency

    async def unary(
        self, request: Message, context: Context, kind: type[Reply], make: Callable[[Turn], Awaitable[Reply]]
    ) -> Reply:
        """A call with one reply. `make`: makes it, once it has its turn."""
        call = current_call()
        tenant = self._tenant(call)
        deadline = self._deadline(context)
        keyed = self._keyed(call, request, deadline)
        async with self._limiter.admitted(call.tenant, call.priority) as admission:
            turn = Turn(call, tenant, admission, deadline, self._settings.secret)
            return await (make(turn) if keyed is None else self._idempotency.unary(keyed, kind, lambda: make(turn)))

    async def stream(
        self,
        request: Message | None,
        context: Context,
        kind: type[Reply],
        make: Callable[[Turn], AsyncGenerator[Reply, None]],
    ) -> AsyncGenerator[Reply, None]:
        """A call with a stream of replies. `request`: None: it is a stream too, which cannot be told twice."""
        call = current_call()
        tenant = self._tenant(call)
        deadline = self._deadline(context)
        keyed = None if request is None else self._keyed(call, request, deadline)
        async with self._limiter.admitted(call.tenant, call.priority) as admission:
            turn = Turn(call, tenant, admission, deadline, self._settings.secret)
            replies = make(turn) if keyed is None else self._idempotency.stream(keyed, kind, lambda: make(turn))
            async with aclosing(replies):
                async for reply in replies:
                    yield reply

    def _keyed(self, call: Call, request: Message, deadline: float) -> Keyed | None:
        key = read_key(call.said)
        if key is None:
            return None
        return Keyed(call.tenant, call.method, key, fingerprint(request), deadline)

    def _tenant(self, call: Call) -> Tenant:
        """Whose call it is. A tenant whose work is batch work makes no other, whatever its calls say."""
        tenant = self._tenants.get(call.tenant)
        if tenant.priority == "batch":
            call.priority = "batch"
        return tenant

    def _deadline(self, context: Context) -> float:
        """When backends must have ended: the caller's deadline, within the server's maximum, less the way back."""
        limits, margin = self._settings.limits, self._settings.gateway.deadline_margin
        remaining = context.time_remaining()
        allowed = limits.deadline_default if remaining is None else min(remaining, limits.deadline_max)
        if allowed <= margin:
            raise DeadlineExceeded(
                f"the deadline leaves less than {margin * 1000:.0f} ms; allow more time", "DEADLINE_UNREACHABLE"
            )
        return time.monotonic() + allowed - margin


def internal_metadata(secret: SecretStr | None, tenant: str) -> Metadata:
    """What gateways say to backends of a tenant, and to prove that they are gateways."""
    told: Metadata = ((INTERNAL_TENANT, tenant),)
    if secret is not None:
        told += ((INTERNAL_SECRET, secret.get_secret_value()),)
    return told


async def forward(method: Method, request: Any, turn: Turn) -> Any:
    """Asks a backend, and returns its reply.

    Raises:
        ChorusError: the backend's own error, or why there was no answer.
    """
    call = method(request, metadata=turn.metadata, timeout=turn.timeout)
    try:
        reply = await call
    except grpc.aio.AioRpcError as error:
        raise told(error) from error
    freed(call)
    return reply


async def forward_stream(
    method: StreamMethod, request: Any, turn: Turn, said: Callable[[Metadata], None] = lambda trailers: None
) -> AsyncGenerator[Any, None]:
    """Asks a backend, and passes each message on before it takes the next: nothing piles up here.

    `request`: a message, or an iterator of messages where the method takes a stream. `said`: hears the backend's
    trailers, if the call comes to its end.

    Raises:
        ChorusError: the backend's own error, or why there was no answer.
    """
    requests = _Requests(request) if isinstance(request, AsyncIterator) else None
    call = mended(method(requests or request, metadata=turn.metadata, timeout=turn.timeout))
    try:
        async for message in call:
            yield message
        said(as_metadata(await call.trailing_metadata()))
    except asyncio.CancelledError:
        # gRPC cancels a call whose requests fail, and keeps the reason to itself.
        if requests is not None and requests.error is not None:
            raise requests.error from None
        raise
    except grpc.aio.AioRpcError as error:
        said(as_metadata(error.trailing_metadata()))
        raise told(error) from error
    finally:
        call.cancel()


class _Requests:
    """A caller's stream of requests, which remembers how it failed."""

    def __init__(self, requests: AsyncIterator[Any]) -> None:
        self._requests = requests
        self.error: Exception | None = None

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        try:
            return await anext(self._requests)
        except StopAsyncIteration:
            raise
        except Exception as error:
            self.error = error
            raise
