"""Who may call, and how much: the tenants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.metadata import Priority


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
