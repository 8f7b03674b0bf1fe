"""The main path of a call through the gateway: who calls, how long it may take, and on to a backend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypeAlias

import grpc
import grpc.aio

from common.calls import Context, current_call
from common.errors import DeadlineExceeded
from common.metadata import INTERNAL_SECRET, INTERNAL_TENANT, PRIORITY, REQUEST_ID, Metadata
from common.settings import Settings
from common.writing import with_servers_word
from gateway.upstream import told

ANYONE = "anyone"
"""The tenant of callers who are not told apart."""

Method: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[Any, Any]"
StreamMethod: TypeAlias = "grpc.aio.UnaryStreamMultiCallable[Any, Any] | grpc.aio.StreamStreamMultiCallable[Any, Any]"


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


class Pipeline:
    """Forwards calls to backends."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def unary(self, method: Method, request: Any, context: Context) -> Any:
        """Asks a backend, and answers with its reply or with its error."""
        try:
            return await method(request, metadata=self._metadata(), timeout=self._timeout(context))
        except grpc.aio.AioRpcError as error:
            raise told(error) from error

    async def stream(self, method: StreamMethod, request: Any, context: Context) -> AsyncGenerator[Any, None]:
        """Asks a backend, and passes each message on before it takes the next: nothing piles up here.

        `request`: a message, or an iterator of messages where the method takes a stream.
        """
        requests = _Requests(request) if isinstance(request, AsyncIterator) else None
        call = method(requests or request, metadata=self._metadata(), timeout=self._timeout(context))
        if requests is not None:
            call = with_servers_word(call)
        try:
            async for message in call:
                yield message
        except asyncio.CancelledError:
            # gRPC cancels a call whose requests fail, and keeps the reason to itself.
            if requests is not None and requests.error is not None:
                raise requests.error from None
            raise
        except grpc.aio.AioRpcError as error:
            raise told(error) from error
        finally:
            call.cancel()

    def _timeout(self, context: Context) -> float:
        """Seconds that the backend gets: the caller's, within the server's maximum, less the way back."""
        limits, margin = self._settings.limits, self._settings.gateway.deadline_margin
        remaining = context.time_remaining()
        allowed = limits.deadline_default if remaining is None else min(remaining, limits.deadline_max)
        if allowed <= margin:
            raise DeadlineExceeded(
                f"the deadline leaves less than {margin * 1000:.0f} ms; allow more time", "DEADLINE_UNREACHABLE"
            )
        return allowed - margin

    def _metadata(self) -> Metadata:
        """What a backend is told of the caller. Nothing of the caller's own metadata passes."""
        call = current_call()
        told: Metadata = ((REQUEST_ID, call.request_id), (INTERNAL_TENANT, call.tenant))
        if call.priority != "interactive":
            told += ((PRIORITY, call.priority),)
        if self._settings.secret is not None:
            told += ((INTERNAL_SECRET, self._settings.secret.get_secret_value()),)
        return told


def identify(metadata: Metadata, peer: str) -> str:
    """The tenant of a call. What a caller says in internal metadata is not heard."""
    return ANYONE
