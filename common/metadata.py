"""The names of the metadata that calls carry."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias, get_args

from common.errors import InvalidArgument, Violation

REQUEST_ID = "x-request-id"
INTERNAL_PREFIX = "x-chorus-internal-"
"""Said by gateways only."""
INTERNAL_SECRET = "x-chorus-internal-secret"  # noqa: S105 (a name)
INTERNAL_TENANT = "x-chorus-internal-tenant"
INTERNAL_SPEECH_KEY = "x-chorus-internal-speech-key"
"""Equal for equal speeches, in hexadecimal digits."""
INTERNAL_REVISION = "x-chorus-internal-revision"
"""What the key was made for: a backend of another revision shares nothing under it."""
INTERNAL_DEADLINE = "x-chorus-internal-deadline-ms"
"""How long the one waits who asked first; the call itself lasts as long as anybody waits."""
INTERNAL_RUN_HERE = "x-chorus-internal-run-here"
"""Speak it, even if another backend does."""
INTERNAL_SHARING = "x-chorus-internal-sharing"
"""With whom the segments of a text that is being written are shared; without it with nobody."""
INTERNAL_MADE = "x-chorus-internal-made-seconds"
"""A service's trailer: of the audio of such a text, what was made for this call."""
CACHE_CONTROL = "cache-control"
ONLY_CACHED = "x-chorus-only-cached"
API_KEY = "x-api-key"
AUTHORIZATION = "authorization"
PRIORITY = "x-chorus-priority"
IDEMPOTENCY_KEY = "idempotency-key"
ORCA_LOAD = "endpoint-load-metrics-bin"

Priority: TypeAlias = Literal["interactive", "batch"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
Sharing: TypeAlias = Literal["all", "tenant"]
"""With whom: all tenants, or only the caller's own."""
Metadata = tuple[tuple[str, str | bytes], ...]
Said: TypeAlias = Mapping[str, str]
"""The text in metadata: each key's first value that is one."""

_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def as_metadata(pairs: Iterable[tuple[str, str | bytes]] | None) -> Metadata:
    """A call's metadata as plain pairs."""
    return tuple(pairs or ())


def said(metadata: Metadata) -> Said:
    """What metadata says in text, read once for all who ask."""
    return {name: value for name, value in reversed(metadata) if isinstance(value, str)}


def text_value(metadata: Metadata, key: str) -> str | None:
    """A key's first value, if it is text."""
    for name, value in metadata:
        if name == key and isinstance(value, str):
            return value
    return None


def priority(said: Said) -> Priority:
    """What a caller says of its haste.

    Raises:
        InvalidArgument: it is neither of the two.
    """
    given = said.get(PRIORITY) or "interactive"
    if given not in PRIORITIES:
        raise InvalidArgument.of([Violation(PRIORITY, f"must be one of {', '.join(PRIORITIES)}")])
    return given


def request_id(said: Said) -> str:
    """The caller's request id, or a new one where there is none that can be logged."""
    given = said.get(REQUEST_ID)
    return given if given and _REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"
