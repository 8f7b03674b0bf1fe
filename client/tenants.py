"""`chorus tenants`: who may call, and what is left of each limit."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from client.embedded import url_of
from common.errors import StartupError
from common.settings import Settings
from common.store import Store, StoreUnavailable
from gateway.limiter import Left, Limiter
from gateway.tenants import Tenants

PATIENCE_SECONDS = 2.0


async def show_tenants(settings: Settings, out: Console) -> None:
    """Prints a line for each limit.

    Raises:
        StartupError: there is no ledger, or it does not answer.
    """
    url = url_of(settings, "ledger")
    if url is None:
        raise StartupError(
            "no ledger runs here: start Chorus with `chorus up`, or name one with --set store.ledger=URL"
        )
    tenants = Tenants(settings.gateway.tenants)
    ledger = Store("ledger", url, settings.store.model_copy(update={"budget": PATIENCE_SECONDS}))
    try:
        limits = await Limiter(ledger, settings.limiter, tenants.get).left(tenants.all())
    except StoreUnavailable:
        raise StartupError("the ledger does not answer: is it running, and is its URL right?") from None
    finally:
        await ledger.close()
    out.print(_table(limits, [tenant.name for tenant in tenants.all()]))


def _table(limits: list[Left], names: list[str]) -> Table:
    table = Table("tenant", "limit", "left", "at most", box=None, header_style="bold")
    for limit in limits:
        table.add_row(limit.tenant or "all", limit.limit, f"{limit.left:,.0f}", f"{limit.most:,.0f}")
    for name in names:
        if all(limit.tenant != name for limit in limits):
            table.add_row(name, "none of its own", "", "")
    return table
