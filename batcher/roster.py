"""The rows that the engine knows: who holds a slot, who has ended and is still to be vocoded, who leaves."""

from __future__ import annotations

from batcher.engine import RowRef
from batcher.request import Priority, Row
from batcher.slots import Slots


class Roster:
    """Who is in the engine. A row that leaves keeps its slot until the plan that tells the engine so."""

    def __init__(self, slots: int) -> None:
        self.rows: dict[int, Row] = {}
        """All that the engine knows, by the names in their refs."""
        self.running: dict[int, Row] = {}
        """Those that hold a slot."""
        self.opening: dict[Row, None] = {}
        """Those of streams that have a slot and no samples yet."""
        self.batch_running = 0
        """Those of batch work that hold a slot."""
        self.longest_leave = 0
        """Most ticks that began between a cancel and the plan that freed its slots."""
        self._slots = Slots(slots)
        self._leaving: list[tuple[RowRef, int]] = []
        self._ticks = 0

    @property
    def slots_free(self) -> int:
        """Slots that a row could join now."""
        return self._slots.free

    @property
    def parked(self) -> int:
        """Rows that have ended and of which samples are yet to be made."""
        return len(self.rows) - len(self.running)

    def find(self, ref: RowRef) -> Row | None:
        """The row that a report speaks of, unless it has left."""
        row = self.rows.get(ref.row)
        return row if row is not None and (row.ref is ref or row.ref == ref) else None

    def seat(self, row: Row) -> None:
        """Gives a row a slot."""
        row.ref = self._slots.seat()
        self.rows[row.ref.row] = self.running[row.ref.row] = row
        self.batch_running += row.request.priority is Priority.BATCH
        request = row.request
        if request.stream and row is request.head and request.heard_from is None:
            self.opening[row] = None

    def end(self, row: Row) -> None:
        """A row has done its last step: its slot is free."""
        self._unseat(row)
        assert row.ref is not None
        self._slots.release(row.ref)

    def forget(self, row: Row) -> None:
        """The engine knows a row no more."""
        self.end(row)
        assert row.ref is not None
        self.rows.pop(row.ref.row, None)

    def leave_soon(self, row: Row) -> None:
        """The engine is to forget a row with the next plan."""
        assert row.ref is not None
        self._unseat(row)
        del self.rows[row.ref.row]
        self._leaving.append((row.ref, self._ticks))

    def leave(self) -> tuple[RowRef, ...]:
        """A plan begins: whom it tells to leave."""
        leaves = tuple(ref for ref, _ in self._leaving)
        self.empty_leaving()
        self._ticks += 1
        return leaves

    def leave_again(self, leaves: tuple[RowRef, ...]) -> None:
        """A plan was not done: its leaves belong to the next one."""
        self._leaving += [(ref, self._ticks) for ref in leaves]

    def empty_leaving(self) -> None:
        """Those who leave are gone."""
        for ref, since in self._leaving:
            self.longest_leave = max(self.longest_leave, self._ticks - since)
            self._slots.release(ref)
        self._leaving.clear()

    def _unseat(self, row: Row) -> None:
        assert row.ref is not None
        self.opening.pop(row, None)
        if self.running.pop(row.ref.row, None) is not None:
            self.batch_running -= row.request.priority is Priority.BATCH
