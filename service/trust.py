"""Who may speak for a caller: gateways name the tenant, and nobody else can."""

from __future__ import annotations

import hmac

from pydantic import SecretStr

from common.errors import PermissionDenied, quoted
from common.metadata import INTERNAL_PREFIX, INTERNAL_SECRET, INTERNAL_TENANT, Metadata, text_value

DIRECT_TENANT = "direct"
"""The tenant of callers who go round the gateway."""

LOOPBACK_PEERS = ("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:")


def tenant_of(metadata: Metadata, peer: str, secret: SecretStr | None) -> str:
    """The tenant that a call is for. `peer`: in gRPC's notation.

    With a secret configured, gateways prove themselves by it; without one they must be on this machine.

    Raises:
        PermissionDenied: someone who is no gateway says what only gateways may say.
    """
    internal = [key for key, _ in metadata if key.startswith(INTERNAL_PREFIX)]
    if not internal:
        return DIRECT_TENANT
    if not _is_gateway(metadata, peer, secret):
        raise PermissionDenied(
            f"metadata {quoted(', '.join(internal))} is for gateways; leave it out, or call a gateway",
            "INTERNAL_METADATA",
        )
    return text_value(metadata, INTERNAL_TENANT) or DIRECT_TENANT


def _is_gateway(metadata: Metadata, peer: str, secret: SecretStr | None) -> bool:
    if secret is None:
        return peer.startswith(LOOPBACK_PEERS)
    shown = text_value(metadata, INTERNAL_SECRET) or ""
    return hmac.compare_digest(shown.encode(), secret.get_secret_value().encode())
