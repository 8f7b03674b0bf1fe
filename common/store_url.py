"""Stores by URL.

- `redis://[user:password@]host:port/db`, `rediss://…` with TLS, `unix://path`: one server.
- `redis+sentinel://[user:password@]host:port,host:port/service[/db]`: whichever server the sentinels call the master.
- `redis+cluster://[user:password@]host:port`: a cluster, for the cache only.

`rediss+sentinel` and `rediss+cluster` speak TLS, also to the sentinels. `valkey` may stand in the place of `redis`.
"""

from __future__ import annotations

import ssl
from typing import Any
from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from common.errors import StartupError
from common.settings import StoreSettings

SENTINEL = "redis+sentinel"
CLUSTER = "redis+cluster"
TLS = {"rediss", "rediss+sentinel", "rediss+cluster"}
CONNECTIONS = 8
"""To one server, from one process."""


def connect(name: str, url: str, settings: StoreSettings) -> Any:
    """A client, which connects with its first command.

    Raises:
        StartupError: the URL means nothing. It is not told, since it may hold a password.
    """
    url = url.replace("valkey", "redis", 1) if url.startswith("valkey") else url
    options: dict[str, Any] = {
        # The client library's own patience would be seconds: see docs/decisions/stores.md.
        "socket_connect_timeout": settings.budget,
        # Round trips are bounded by who makes them (common/store.py): a clock for each reply took a tenth of a GET.
        "socket_timeout": None,
        "protocol": 3,
    }
    try:
        scheme = urlsplit(url).scheme
        if scheme in TLS:
            options |= _tls(settings)
        kind = scheme.replace("rediss", "redis")
        if kind in (SENTINEL, CLUSTER):
            return (_sentinel if kind == SENTINEL else _cluster)(url, options | {"ssl": scheme in TLS})
        return Redis.from_url(
            url, retry=Retry(NoBackoff(), 0), max_connections=CONNECTIONS, **parse_url(url), **options
        )
    except (ValueError, TypeError):
        raise StartupError(
            f"store.{name} is no URL of a store; write it as redis://host:6379/0, rediss://, unix://, "
            f"{SENTINEL}://host:port,host:port/service, or {CLUSTER}://host:port"
        ) from None


async def disconnect(client: Any) -> None:
    """Closes a client's connections."""
    await client.aclose()
    manager = getattr(getattr(client, "connection_pool", None), "sentinel_manager", None)
    if manager is not None:
        await client.connection_pool.disconnect()
        for sentinel in manager.sentinels:
            await sentinel.aclose()


def _sentinel(url: str, options: dict[str, Any]) -> Any:
    parts = urlsplit(url)
    service, _, database = parts.path.lstrip("/").partition("/")
    if not service:
        raise ValueError("a sentinel's URL names the service")
    nodes = [_node(node, 26379) for node in parts.netloc.rpartition("@")[2].split(",")]
    no_retry = Retry(NoBackoff(), 0)
    make: Any = Sentinel  # its types are missing
    sentinel = make(nodes, sentinel_kwargs={**options, "retry": no_retry})
    return sentinel.master_for(
        service,
        username=_name(parts.username),
        password=_name(parts.password),
        db=int(database or 0),
        retry=no_retry,
        max_connections=CONNECTIONS,
        **options,
    )


def _cluster(url: str, options: dict[str, Any]) -> Any:
    parts = urlsplit(url)
    host, port = _node(parts.netloc.rpartition("@")[2], 6379)
    return RedisCluster(
        host=host,
        port=port,
        username=_name(parts.username),
        password=_name(parts.password),
        retry=Retry(NoBackoff(), 0),
        max_connections=CONNECTIONS,
        **options,
    )


def _node(address: str, port: int) -> tuple[str, int]:
    host, colon, given = address.rpartition(":")
    return (host, int(given)) if colon else (given, port)


def _name(quoted: str | None) -> str | None:
    return None if quoted is None else unquote(quoted)


def _tls(settings: StoreSettings) -> dict[str, Any]:
    paths = {
        "ssl_ca_certs": settings.tls_ca,
        "ssl_certfile": settings.tls_certificate,
        "ssl_keyfile": settings.tls_key,
    }
    return {"ssl_cert_reqs": ssl.CERT_REQUIRED} | {name: str(path) for name, path in paths.items() if path is not None}
