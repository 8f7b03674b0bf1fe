"""Idempotency keys: a call that is made again joins the one that runs, or gets what came of it. It runs once."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from common import metrics
from common.calls import current_call
from common.errors import (
    Aborted,
    ChorusError,
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    Violation,
)
from common.logs import logger
from common.metadata import IDEMPOTENCY_KEY, Said
from common.objects import Objects
from common.store import Store, StoreUnavailable
from common.tape import Abandoned, Tape, is_anothers
from gateway.claims import KEPT_SECONDS, LEASE_SECONDS, Claim, Keyed, State
from gateway.records import MOST_BYTES, Record, drop_record, get_record, is_kept, put_record

TRAILER = "x-chorus-idempotency"
"""Tells how a keyed call was answered: claimed, joined, replayed, unavailable."""

MARGIN_SECONDS = 0.2
"""What is left of a deadline when a call that cannot join gives up, so that its caller hears why."""
FIRST_POLL_SECONDS = 0.05
LONGEST_POLL_SECONDS = 1.0
BUSY_SECONDS = 1.0
"""When to try again a call that runs elsewhere."""
MOST_RUNNING_BYTES = 256 * 1024 * 1024
"""What keyed calls that run may have sent, together: it is held for those who join, and to be kept."""
SWEEP_SECONDS = 3600.0

_KEY = re.compile(r"[ -~]{1,255}")
_JOBS = uuid.UUID("0b6e8f5c-4a0d-5a53-9d0e-6f6c7a1f4d5b")

M = TypeVar("M", bound=Any)


def read_key(said: Said) -> str | None:
    """The key of a call, if it has one.

    Raises:
        InvalidArgument: it is none.
    """
    key = said.get(IDEMPOTENCY_KEY)
    if key is None or (_KEY.fullmatch(key) and key.strip()):
        return key
    raise InvalidArgument.of([Violation(IDEMPOTENCY_KEY, "must be 1 to 255 printable ASCII characters")])


def fingerprint(request: Message) -> bytes:
    """Equal for equal requests, 32 bytes."""
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()


def job_id(tenant: str, key: str) -> str:
    """The id of the job that a keyed call makes: the same one whenever it is made."""
    return str(uuid.uuid5(_JOBS, f"{tenant}\0{key}"))


class _Run(Generic[M]):
    """A keyed call in this process, and all who wait for it."""

    def __init__(self, keyed: Keyed) -> None:
        self.keyed = keyed
        self.outcome = "unavailable"
        self.tape: Tape[M]


class Idempotency:
    """The keyed calls of one gateway."""

    def __init__(self, ledger: Store, objects: Objects, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._objects = objects
        self._clock = clock
        self._runs: dict[str, _Run[Any]] = {}

    async def unary(self, keyed: Keyed, kind: type[M], make: Callable[[], Awaitable[M]]) -> M:
        """A call with one message. `make`: runs it; called at most once.

        Raises:
            ChorusError: as `stream`.
        """

        async def one() -> AsyncGenerator[M, None]:
            yield await make()

        async with aclosing(self.stream(keyed, kind, one)) as messages:
            async for message in messages:
                return message
        raise AssertionError("a unary call has a message")

    async def stream(
        self, keyed: Keyed, kind: type[M], make: Callable[[], AsyncGenerator[M, None]]
    ) -> AsyncGenerator[M, None]:
        """A call with several messages. `kind`: of message. `make`: runs it; called at most once.

        Raises:
            InvalidArgument: the key was used for another request.
            Aborted: it runs elsewhere, and does not end in time.
            ChorusError: what `make` raised, now or when it was run.
        """
        while True:
            run = self._runs.get(keyed.name)
            joined = run is not None and run.tape.joinable
            if run is None or not joined:
                self._check_room()
                run = self._start(keyed, kind, make)
            elif run.keyed.fingerprint != keyed.fingerprint:
                raise _reused()
            began = False
            try:
                async with aclosing(run.tape.follow()) as messages:
                    async for message in messages:
                        if not began:
                            _tell("joined" if joined else run.outcome)
                            began = True
                        yield message
                return
            except (Abandoned, ChorusError) as error:
                # Another caller's deadline, or its leaving, is not ours.
                if joined and not began and self._clock() < keyed.deadline and _is_anothers(error):
                    continue
                if isinstance(error, ChorusError):
                    raise
                raise DeadlineExceeded("the deadline passed", "DEADLINE_EXCEEDED") from None

    async def run(self) -> None:
        """Forgets what is old, now and then, until cancelled."""
        while True:
            with suppress(StoreUnavailable):
                await self._objects.sweep("claims", days=int(KEPT_SECONDS // 86_400) + 1)
            await asyncio.sleep(SWEEP_SECONDS)

    def _start(self, keyed: Keyed, kind: type[M], make: Callable[[], AsyncGenerator[M, None]]) -> _Run[M]:
        run: _Run[M] = _Run(keyed)

        def done(tape: Tape[M]) -> None:
            if self._runs.get(keyed.name) is run:
                del self._runs[keyed.name]

        run.tape = Tape(self._answer(run, kind, make), size=_size, done=done)
        self._runs[keyed.name] = run
        return run

    async def _answer(
        self, run: _Run[M], kind: type[M], make: Callable[[], AsyncGenerator[M, None]]
    ) -> AsyncGenerator[M, None]:
        """What a keyed call is answered: from the record, or by running it."""
        claim = Claim(self._ledger, run.keyed)
        record = await self._claimed(run, claim)
        if record is not None:
            for data in record.messages:
                yield kind.FromString(data)
            if record.error is not None:
                raise record.error
            return
        messages = make() if run.outcome == "unavailable" else self._kept(run, claim, make)
        async with aclosing(messages):
            async for message in messages:
                yield message

    async def _claimed(self, run: _Run[M], claim: Claim) -> Record | None:
        """Claims, or waits for the record of whoever has; None: run it."""
        pause = FIRST_POLL_SECONDS
        while True:
            try:
                state, kept = await claim.take()
            except StoreUnavailable:
                _count("unavailable")
                return None
            if state is State.CLAIMED:
                _count("claimed" if pause == FIRST_POLL_SECONDS else "taken over")
                run.outcome = "claimed"
                return None
            if state is State.REUSED:
                _count("reused")
                raise _reused()
            if state is State.DONE:
                try:
                    record = await get_record(self._objects, kept)
                    if record is not None:
                        _count("replayed")
                        run.outcome = "replayed"
                        return record
                    await claim.forget(kept)
                except StoreUnavailable:
                    _count("unavailable")
                    return None
                continue
            if self._clock() + pause + MARGIN_SECONDS > run.keyed.deadline:
                _count("in progress")
                raise Aborted(
                    "this call runs already and has not ended yet; try again to get its answer",
                    "IDEMPOTENCY_IN_PROGRESS",
                    retry_after=BUSY_SECONDS,
                )
            await asyncio.sleep(pause)
            pause = min(LONGEST_POLL_SECONDS, pause * 2)

    async def _kept(
        self, run: _Run[M], claim: Claim, make: Callable[[], AsyncGenerator[M, None]]
    ) -> AsyncGenerator[M, None]:
        """Runs the call and keeps what came of it. The last message leaves only when all are kept."""
        last: M | None = None
        failure: ChorusError | None = None
        kept = False
        async with _renewed(claim):
            try:
                try:
                    async with aclosing(make()) as made:
                        async for message in made:
                            if last is not None:
                                yield last
                            last = message
                except ChorusError as error:
                    failure = error
                if failure is None or is_kept(failure):
                    # The tape has all that left already.
                    messages = run.tape.messages if last is None else [*run.tape.messages, last]
                    if sum(map(_size, messages)) <= MOST_BYTES:
                        parts = [message.SerializeToString() for message in messages]
                        kept = await self._keep(claim, Record(parts, failure))
            finally:
                if not kept:
                    with suppress(StoreUnavailable):
                        await asyncio.shield(claim.free())
        if last is not None:
            yield last
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # its traceback leads here, and from here would lead to it

    def _check_room(self) -> None:
        if sum(run.tape.bytes for run in self._runs.values()) >= MOST_RUNNING_BYTES:
            raise ResourceExhausted(
                "there is no room for the audio of one more call with an idempotency key; try again in a second",
                "TOO_MANY_CALLS",
                retry_after=BUSY_SECONDS,
                quota="keyed_calls",
            )

    async def _keep(self, claim: Claim, record: Record) -> bool:
        try:
            kept = await put_record(self._objects, claim.unique, record.to_bytes())
            if await claim.finish(kept):
                return True
            # Its lease ended while it was paused, and somebody else has run it since.
            _count("fenced")
            await drop_record(self._objects, kept)
        except StoreUnavailable:
            _count("unavailable")
        return False


@asynccontextmanager
async def _renewed(claim: Claim) -> AsyncGenerator[None, None]:
    async def renew() -> None:
        while True:
            await asyncio.sleep(LEASE_SECONDS / 3)
            with suppress(StoreUnavailable):
                if not await claim.renew():
                    logger().warning("lost a claim: this process was paused, or the ledger forgot")
                    return

    renewing = asyncio.create_task(renew())
    try:
        yield
    finally:
        renewing.cancel()


def needs_ledger(ledger: Store) -> None:
    """For calls that may not run unclaimed.

    Raises:
        Unavailable: the ledger is away.
    """
    if not ledger.available:
        raise Unavailable("the store of jobs does not answer; try again", "STORE_UNAVAILABLE", retry_after=1.0)


def _is_anothers(error: BaseException) -> bool:
    # Somebody else's patience with a call that runs elsewhere was shorter.
    return is_anothers(error) or isinstance(error, Aborted)


def _size(message: Message) -> int:
    return message.ByteSize()


def _tell(outcome: str) -> None:
    if outcome == "joined":
        _count("joined")
    current_call().trail(TRAILER, outcome)


def _count(outcome: str) -> None:
    metrics.CLAIMS.labels(outcome).inc()


def _reused() -> InvalidArgument:
    return InvalidArgument(
        "this idempotency key was used for another request; use a new key for a new request",
        "IDEMPOTENCY_KEY_REUSED",
        violations=[Violation(IDEMPOTENCY_KEY, "was used for another request")],
    )
