"""Who may call, and how much: the tenants, from one file that is read again whenever it changes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from common.errors import StartupError, Unauthenticated
from common.logs import logger
from common.metadata import API_KEY, AUTHORIZATION, Metadata, Priority, text_value
from common.settings import Count, PositiveSeconds, Section

ANYONE = "anyone"
"""The tenant of callers who are not told apart."""
RESERVED = frozenset({ANYONE, "direct", "gateway"})
"""Names that mean something in logs and to services."""
POLL_SECONDS = 1.0
PREFIX = "sha256:"
BEARER = "bearer "
LOOKUP_DIGITS = 16
"""Of a hash: enough that no two keys share them."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A token bucket: it fills by `rate` a second up to `burst`, and begins full."""

    rate: float
    burst: float


@dataclass(frozen=True, slots=True)
class Tenant:
    """A caller among others, with what it may use. Without a limit (None) only the limits of all tenants apply."""

    name: str
    requests: Bucket | None = None
    audio: Bucket | None = None
    """In seconds of audio."""
    concurrent: int | None = None
    """Calls that may run at once, on all gateways together."""
    priority: Priority = "interactive"
    """The highest that its calls may have."""
    cache_scope: Literal["shared", "tenant"] = "shared"
    """`tenant`: nobody else hears from the cache what was made for it, nor it what was made for others."""


def new_key() -> str:
    """An API key: 256 random bits."""
    return f"chorus_{secrets.token_urlsafe(32)}"


def hashed(key: str) -> str:
    """A key as the file has it.

    Keys are long and random: nobody guesses one from its hash, so a slow hash, which each call would wait for, would
    protect nothing.
    """
    return PREFIX + hashlib.sha256(key.encode()).hexdigest()


def _check_hash(key: str) -> str:
    digest = key.removeprefix(PREFIX)
    if digest == key or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ValueError("must be sha256: and 64 hexadecimal digits, as `chorus key` prints it; never the key itself")
    return key


class _Entry(Section):
    """A tenant in the file."""

    keys: tuple[Annotated[str, AfterValidator(_check_hash)], ...] = ()
    requests_per_second: PositiveSeconds | None = None
    requests_burst: PositiveSeconds | None = None
    audio_seconds_per_second: PositiveSeconds | None = None
    audio_seconds_burst: PositiveSeconds | None = None
    concurrent: Count | None = None
    priority: Priority = "interactive"
    cache_scope: Literal["shared", "tenant"] = "shared"

    @model_validator(mode="after")
    def _check_bursts(self) -> _Entry:
        for kind in ("requests", "audio_seconds"):
            if getattr(self, f"{kind}_burst") is not None and getattr(self, f"{kind}_per_second") is None:
                raise ValueError(f"{kind}_burst means nothing without {kind}_per_second")
        return self

    def tenant(self, name: str) -> Tenant:
        """As the gateway has it."""
        return Tenant(
            name,
            _bucket(self.requests_per_second, self.requests_burst),
            _bucket(self.audio_seconds_per_second, self.audio_seconds_burst),
            self.concurrent,
            self.priority,
            self.cache_scope,
        )


class _File(Section):
    tenants: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")], _Entry], Field(min_length=1)]


@dataclass(frozen=True)
class Registry:
    """The tenants of one state of the file."""

    tenants: Mapping[str, Tenant]
    names: Mapping[bytes, tuple[bytes, str]]
    """The hash of a key and whose it is, by the beginning of the hash."""

    def of(self, key: str) -> str | None:
        """Whose key it is. It is looked up by a part of its hash, and compared in constant time."""
        shown = hashed(key).encode()
        kept, name = self.names.get(shown[: len(PREFIX) + LOOKUP_DIGITS], (b"", ""))
        return name if hmac.compare_digest(shown, kept) else None


def read_tenants(path: Path) -> Registry:
    """Reads the file.

    Raises:
        StartupError: names every fault in it.
    """
    try:
        file = _File(**tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise StartupError(f"cannot read the tenants' file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartupError(f"the tenants' file {path} is not TOML: {error}") from None
    except (ValidationError, TypeError) as error:
        raise StartupError(f"the tenants' file {path} is wrong:\n{_faults(error)}") from None
    if reserved := RESERVED & file.tenants.keys():
        raise StartupError(f"the tenants' file {path} is wrong:\n  {', '.join(reserved)}: this name is Chorus's own")
    names: dict[bytes, tuple[bytes, str]] = {}
    for name, entry in file.tenants.items():
        for key in entry.keys:
            digest = key.encode()
            if names.setdefault(digest[: len(PREFIX) + LOOKUP_DIGITS], (digest, name)) != (digest, name):
                raise StartupError(f"the tenants' file {path} is wrong:\n  a key belongs to two tenants, {name} is one")
    return Registry({name: entry.tenant(name) for name, entry in file.tenants.items()}, names)


class Tenants:
    """The tenants, as the file has them now. Without a file everybody is the same one, and needs no key."""

    def __init__(self, path: Path | None) -> None:
        """Reads the file.

        Raises:
            StartupError: names every fault in it.
        """
        self._path = path
        self._seen = _version(path)
        self._registry = Registry({}, {}) if path is None else read_tenants(path)
        self._known = {ANYONE: Tenant(ANYONE)} | dict(self._registry.tenants)

    def identify(self, metadata: Metadata, peer: object = None) -> str:
        """The tenant of a call, from wherever it comes. What a caller says in internal metadata is not heard.

        Raises:
            Unauthenticated: the key is missing, or nobody's.
        """
        if self._path is None:
            return ANYONE
        key = _shown(metadata)
        if key is None:
            raise Unauthenticated(
                f"send your key as metadata {API_KEY}, or as {AUTHORIZATION}: Bearer KEY", "API_KEY_MISSING"
            )
        name = self._registry.of(key)
        if name is None:
            raise Unauthenticated("this key is nobody's: it is mistyped, or was withdrawn", "API_KEY_WRONG")
        return name

    def get(self, name: str) -> Tenant:
        """A tenant by its name; one that was taken out of the file is what it was, for calls that still run."""
        return self._known.get(name) or Tenant(name)

    def all(self) -> tuple[Tenant, ...]:
        """All of them, in the file's order."""
        return tuple(self._registry.tenants.values())

    async def follow(self) -> None:
        """Reads the file again when it changes, until cancelled. A faulty one changes nothing."""
        while self._path is not None:
            await asyncio.sleep(POLL_SECONDS)
            self.refresh()

    def refresh(self) -> None:
        """Reads the file again if it has changed."""
        version = _version(self._path)
        if self._path is None or version == self._seen:
            return
        self._seen = version
        try:
            self._registry = read_tenants(self._path)
        except StartupError as error:
            logger().error("the tenants' file is wrong: the tenants stay as they were", fault=str(error))
        else:
            self._known |= self._registry.tenants
            logger().info("tenants read again", tenants=len(self._registry.tenants))


def _version(path: Path | None) -> tuple[int, int, int] | None:
    try:
        stat = path.stat() if path is not None else None
    except OSError:
        return None
    return None if stat is None else (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def _shown(metadata: Metadata) -> str | None:
    key = text_value(metadata, API_KEY)
    if key is None:
        authorization = text_value(metadata, AUTHORIZATION) or ""
        if authorization[: len(BEARER)].lower() == BEARER:
            key = authorization[len(BEARER) :].strip()
    return key or None


def _faults(error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return "  only [tenants.NAME] may be in it"
    # Never what was given: it may be a key.
    faults = error.errors(include_input=False, include_url=False)
    return "\n".join(f"  {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults)


def _bucket(rate: float | None, burst: float | None) -> Bucket | None:
    return None if rate is None else Bucket(rate, burst or rate)
