"""What every rival is told when it starts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Options:
    """Where it listens, and the knobs."""

    host: str
    port: int
    rows: int
    """In a batch, at most."""
    wait_seconds: float
    """How long a batch that isn't full waits for more."""
    calls: int | None
    """At once, at most: more are refused."""

    @property
    def address(self) -> str:
        """Host and port."""
        return f"{self.host}:{self.port}"


def options() -> Options:
    """The command line's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--wait-ms", type=float, default=5.0)
    parser.add_argument("--calls", type=int)
    args = parser.parse_args()
    host, _, port = args.address.rpartition(":")
    return Options(host, int(port), args.rows, args.wait_ms / 1000, args.calls)
