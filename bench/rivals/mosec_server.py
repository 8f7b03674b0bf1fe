"""mosec: a Rust server before a Python worker; batches of whole utterances."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mosec import Server, Worker

from bench.rivals.engines import WholeUtteranceEngine
from bench.rivals.options import options
from common.settings import load_settings


class Speaker(Worker):
    """The engine."""

    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        super().__init__()
        self._engine = WholeUtteranceEngine(load_settings().tone)

    def forward(self, data: Sequence[dict[str, str]]) -> list[bytes]:
        """A batch."""
        return self._engine.speak([each["text"] for each in data])

    def serialize(self, data: bytes) -> bytes:
        """Samples as they are."""
        return data


def main() -> None:
    """Serves until it is killed."""
    told = options()
    wait_ms = round(told.wait_seconds * 1000)
    # Its own command line; a wait of 0 can only be said there.
    sys.argv[1:] = [
        f"--address={told.host}",
        f"--port={told.port}",
        f"--wait={wait_ms}",
        "--timeout=60000",
        f"--capacity={2 * told.rows}",  # a batch that runs and one that waits: the default, 1024, lets all be late
        "--log-level=warning",
    ]
    server = Server()
    server.append_worker(Speaker, max_batch_size=told.rows, max_wait_time=wait_ms)
    server.run()


if __name__ == "__main__":
    main()
