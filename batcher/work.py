"""How much work lies before the engine: predicted steps of all rows that wait or run, by rank and by tenant."""

from __future__ import annotations

from batcher.request import Priority, Request, Row

STREAMS, CALLS, BATCH = range(3)
"""Whose rows come before whose, as a rule."""


def rank(request: Request) -> int:
    """Of the three."""
    if request.priority is Priority.BATCH:
        return BATCH
    return STREAMS if request.stream else CALLS


class Work:
    """Counts steps. A row counts from when it may run until it ends or leaves."""

    def __init__(self) -> None:
        self.steps = 0
        self.waiting = [0, 0, 0]
        """Of rows that have no slot, by the rank of their requests."""
        self.by_tenant: dict[str, int] = {}
        """Only tenants that have any."""

    @property
    def running(self) -> int:
        """Of rows that have a slot."""
        return self.steps - sum(self.waiting)

    def wait(self, row: Row) -> None:
        """A row may join."""
        self._set(row, row.prediction.steps_p90)
        self.waiting[rank(row.request)] += row.work_steps

    def start(self, row: Row) -> None:
        """A row that waited joins."""
        self.waiting[rank(row.request)] -= row.work_steps

    def progress(self, row: Row, steps: int) -> None:
        """A row that runs has done so many more steps."""
        if steps < row.work_steps:  # as almost always: once a tick for each row
            row.work_steps -= steps
            self.steps -= steps
            self.by_tenant[row.request.tenant] -= steps
        else:
            self._set(row, 0)

    def drop(self, row: Row) -> None:
        """Nothing of a row is left to do."""
        if row.ref is None:
            self.waiting[rank(row.request)] -= row.work_steps
        self._set(row, 0)

    def _set(self, row: Row, steps: int) -> None:
        change = steps - row.work_steps
        row.work_steps = steps
        self.steps += change
        tenant = row.request.tenant
        left = self.by_tenant.get(tenant, 0) + change
        if left:
            self.by_tenant[tenant] = left
        else:
            self.by_tenant.pop(tenant, None)
