"""The services behind a gateway: one channel, on which gRPC itself balances, checks health and retries.

- `weighted_round_robin` takes each service's load from the ORCA report in its trailers.
- A service that is NOT_SERVING gets no calls (client-side health checks).
- UNAVAILABLE is retried on another service, only before the first byte of a reply, and within a budget: each failure
  takes a token, each success gives a tenth back, and with less than half of the tokens there are no retries.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio

from common.settings import Settings
from common.tls import channel_credentials

HEALTH_SERVICE = "chorus.v1.TextToSpeechService"
RETRY_TOKENS = 100
RETRY_REFUND = 0.1
MAX_ATTEMPTS = 3
LOOKAHEAD_BYTES = 65_536
"""What a stream may hold ready in the gateway for a reader who does not read."""

SERVICE_CONFIG = {
    "loadBalancingConfig": [
        {
            "weighted_round_robin": {
                "blackoutPeriod": "1s",
                "weightExpirationPeriod": "30s",
                "weightUpdatePeriod": "1s",
            }
        }
    ],
    "healthCheckConfig": {"serviceName": HEALTH_SERVICE},
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": MAX_ATTEMPTS,
                "initialBackoff": "0.02s",
                "maxBackoff": "0.5s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": RETRY_TOKENS, "tokenRatio": RETRY_REFUND},
}


def open_channel(backends: str, settings: Settings) -> grpc.aio.Channel:
    """A channel to all backends, with TLS if there is `tls.services_ca`. `backends`: as in `gateway.backends`.

    Raises:
        StartupError: the certificates cannot be read.
    """
    tls, options = settings.tls, channel_options(settings)
    if tls.services_ca is None:
        return grpc.aio.insecure_channel(target(backends), options=options)
    credentials = channel_credentials(tls.services_ca, tls.certificate, tls.key)
    return grpc.aio.secure_channel(target(backends), credentials, options=options)


def channel_options(settings: Settings) -> list[tuple[str, str | int]]:
    """The options of a channel in gRPC's own names."""
    limits, name = settings.limits, settings.tls.services_name
    return [
        *([("grpc.ssl_target_name_override", name)] if name is not None else []),
        ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
        ("grpc.enable_retries", 1),
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.max_send_message_length", limits.message_bytes),
        # A backend that is stopped, not dead, answers no ping: its calls fail after 10 s, and it gets no more.
        ("grpc.keepalive_time_ms", 6_000),
        ("grpc.keepalive_timeout_ms", 4_000),
        # Without it gRPC sends two such pings and then one a minute, while there is nothing else to send.
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.ping_timeout_ms", 4_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", LOOKAHEAD_BYTES),
    ]


def target(backends: str) -> str:
    """Addresses as one gRPC target.

    Several `HOST:PORT` become one list; hosts in it must be IPv4 addresses, which is all that gRPC's list takes. What
    is a target already, such as `dns:///name:port`, stays as it is.
    """
    addresses = [address.strip().replace("localhost:", "127.0.0.1:") for address in backends.split(",")]
    if len(addresses) == 1:
        return addresses[0]
    return "ipv4:" + ",".join(addresses)


async def watch(channel: grpc.aio.Channel, changed: Callable[[bool], Awaitable[None]]) -> None:
    """Tells, now and at each change until cancelled, whether any backend is ready."""
    was: bool | None = None
    while True:
        state = channel.get_state(try_to_connect=True)
        ready = state is grpc.ChannelConnectivity.READY
        if ready is not was:
            await changed(ready)
            was = ready
        await channel.wait_for_state_change(state)
