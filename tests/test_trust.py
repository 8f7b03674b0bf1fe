"""Who may speak for a caller."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from pydantic import SecretStr

from common.errors import PermissionDenied, StartupError
from common.metadata import Metadata, request_id, said
from common.settings import Settings
from service.trust import DIRECT_TENANT, check_listen, tenant_of

SECRET = SecretStr("between us")
TENANT = ("x-chorus-internal-tenant", "acme")
SHOWN = ("x-chorus-internal-secret", "between us")
NEAR, FAR = "ipv4:127.0.0.1:5", "ipv4:10.0.0.9:5"


@pytest.mark.parametrize(
    ("metadata", "peer", "secret", "tenant"),
    [
        ((), NEAR, None, DIRECT_TENANT),
        ((), NEAR, SECRET, DIRECT_TENANT),
        ((("x-request-id", "1"),), NEAR, SECRET, DIRECT_TENANT),
        ((TENANT, SHOWN), FAR, SECRET, "acme"),
        ((SHOWN,), FAR, SECRET, DIRECT_TENANT),
        ((("x-chorus-internal-tenant", ""), SHOWN), FAR, SECRET, DIRECT_TENANT),
        *(
            ((TENANT,), peer, None, "acme")
            for peer in (NEAR, "ipv4:127.9.9.9:5", "ipv6:[::1]:5", "ipv6:%5B::1%5D:5", "unix:")
        ),
    ],
)
def test_who_a_call_is_for(metadata: Metadata, peer: str, secret: SecretStr | None, tenant: str) -> None:
    assert tenant_of(metadata, peer, secret) == tenant


@pytest.mark.parametrize(
    "peer", [FAR, "ipv4:1.127.0.1:5", "ipv6:[::2]:5", "ipv6:%5B2001:db8::1%5D:5", "vsock:127.", ""]
)
def test_without_a_secret_only_this_machine_is_trusted(peer: str) -> None:
    with pytest.raises(PermissionDenied):
        tenant_of((TENANT,), peer, None)


@pytest.mark.parametrize("shown", [None, "", "between", "between us ", b"between us", "ключ"])
@pytest.mark.parametrize("peer", [NEAR, FAR])
def test_with_a_secret_nobody_is_trusted_without_it(shown: str | bytes | None, peer: str) -> None:
    metadata: Metadata = (TENANT,) if shown is None else (TENANT, ("x-chorus-internal-secret", shown))
    with pytest.raises(PermissionDenied) as caught:
        tenant_of(metadata, peer, SECRET)
    assert caught.value.reason == "INTERNAL_METADATA"
    assert "x-chorus-internal-tenant" in caught.value.message
    assert SECRET.get_secret_value() not in caught.value.message


@pytest.mark.parametrize("secret", [None, SECRET])
def test_other_machines_may_not_go_round_the_gateway_unless_they_are_allowed_to(secret: SecretStr | None) -> None:
    asked = (("x-chorus-priority", "interactive"),)
    with pytest.raises(PermissionDenied) as caught:
        tenant_of(asked, FAR, secret)
    assert caught.value.reason == "DIRECT_CALL"
    assert tenant_of(asked, FAR, secret, allow_direct=True) == DIRECT_TENANT


@pytest.mark.parametrize(
    ("settings", "opens"),
    [
        ({"service": {"listen": "127.0.0.1:1"}}, True),
        ({"service": {"listen": "unix:/tmp/x"}}, True),
        ({"service": {"listen": "[::1]:1"}}, True),
        ({"service": {"listen": "0.0.0.0:1"}}, False),
        ({"service": {"listen": "chorus.example:1"}}, False),
        ({"service": {"listen": "0.0.0.0:1", "allow_direct": True}}, True),
        ({"service": {"listen": "0.0.0.0:1"}, "secret": "between us"}, True),
    ],
)
def test_a_service_is_not_open_to_other_machines_by_mistake(settings: dict[str, Any], opens: bool) -> None:
    with nullcontext() if opens else pytest.raises(StartupError, match="CHORUS_SECRET"):
        check_listen(Settings(**settings))


def test_internal_names_that_mean_nothing_are_refused_too() -> None:
    with pytest.raises(PermissionDenied):
        tenant_of((("x-chorus-internal-new", "1"),), FAR, None)


@pytest.mark.parametrize("given", ["a", "~" * 128, "Ab-1_2/3:4"])
def test_a_request_id_is_kept(given: str) -> None:
    assert request_id(said((("x-request-id", given),))) == given


@pytest.mark.parametrize("given", ["", "a" * 129, "a b", "a\n", "é", b"bytes"])
def test_a_request_id_that_cannot_be_logged_is_replaced(given: str | bytes) -> None:
    made = request_id(said((("x-request-id", given),)))
    assert len(made) == 32
    assert made != given
