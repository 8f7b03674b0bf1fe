"""Who may speak for a caller: gateways name the tenant, and nobody else can."""

from __future__ import annotations

import hmac

from pydantic import SecretStr

from common.errors import PermissionDenied, StartupError, quoted
from common.metadata import INTERNAL_PREFIX, INTERNAL_SECRET, INTERNAL_TENANT, Metadata, text_value
from common.settings import Settings, is_loopback

DIRECT_TENANT = "direct"
"""The tenant of callers who go round the gateway."""

LOOPBACK_PEERS = ("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:")


def tenant_of(metadata: Metadata, peer: str, secret: SecretStr | None, allow_direct: bool = False) -> str:
    """The tenant that a call is for. `peer`: in gRPC's notation.

    With a secret configured, gateways prove themselves by it; without one they must be on this machine. Whoever goes
    round the gateways has a priority of its own choice and no limit: so it must be on this machine, or allowed to.

    Raises:
        PermissionDenied: someone who is no gateway says what only gateways may say, or may not call at all.
    """
    internal = [key for key, _ in metadata if key.startswith(INTERNAL_PREFIX)]
    if not internal:
        if allow_direct or peer.startswith(LOOPBACK_PEERS):
            return DIRECT_TENANT
        raise PermissionDenied("this is a service; call a gateway", "DIRECT_CALL")
    if not _is_gateway(metadata, peer, secret):
        raise PermissionDenied(
            f"metadata {quoted(', '.join(internal))} is for gateways; leave it out, or call a gateway",
            "INTERNAL_METADATA",
        )
    return text_value(metadata, INTERNAL_TENANT) or DIRECT_TENANT


def check_listen(settings: Settings) -> None:
    """Refuses to be open to other machines by mistake.

    Raises:
        StartupError: it would be.
    """
    service = settings.service
    if settings.secret is None and not service.allow_direct and not is_loopback(service.listen):
        raise StartupError(
            f"a service on {service.listen} is open to other machines, and knows its gateways by a secret: set the "
            "same CHORUS_SECRET here and at the gateways (openssl rand -hex 32), or service.allow_direct=true to let "
            "everybody in"
        )


def _is_gateway(metadata: Metadata, peer: str, secret: SecretStr | None) -> bool:
    if secret is None:
        return peer.startswith(LOOPBACK_PEERS)
    shown = text_value(metadata, INTERNAL_SECRET) or ""
    return hmac.compare_digest(shown.encode(), secret.get_secret_value().encode())
