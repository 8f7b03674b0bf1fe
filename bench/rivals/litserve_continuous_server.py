"""LitServe with its loop of continuous batching: first come, first served, every reply streamed.

Its queue has no bound. With `--calls` a middleware of ours gives it one, to tell what comes of that alone.
"""

from __future__ import annotations

from typing import Any

from litserve import LitAPI, LitServer
from litserve.loops.continuous_batching_loop import ContinuousBatchingLoop, Output
from litserve.utils import LitAPIStatus

from bench.rivals.engines import Piece, StepEngine
from bench.rivals.options import options
from common.settings import load_settings


class Speaker(LitAPI):
    """The engine."""

    def setup(self, device: object) -> None:
        """In the worker."""
        self.engine = StepEngine(load_settings().tone)

    def add_request(self, uid: str, request: dict[str, Any]) -> None:
        """A row joins."""
        self.engine.join(uid, request["text"], request["stream"])

    def has_capacity(self) -> bool:
        """Whether another may."""
        return self.engine.rows < self.max_batch_size

    def has_active_requests(self) -> bool:
        """Whether there is anything to do."""
        return self.engine.rows > 0

    def step(self, before: object) -> list[Output]:
        """Steps until there is something to send. The loop would rest 10 ms after a step without."""
        while self.engine.rows:
            if pieces := self.engine.step():
                return [output for piece in pieces for output in _outputs(piece)]
        return []

    def predict(self, inputs: object) -> object:
        """Not used: the loop wants to see it."""
        raise NotImplementedError

    def encode_response(self, output: bytes) -> bytes:
        """Samples as they are."""
        return output


def _outputs(piece: Piece) -> list[Output]:
    """The end has an output of its own: LitServe drops what comes with it."""
    outputs = [Output(piece.key, piece.pcm, LitAPIStatus.OK)]
    return [*outputs, Output(piece.key, b"", LitAPIStatus.FINISH_STREAMING)] if piece.last else outputs


class AtMost:
    """ASGI middleware: answers 503 while so many calls are being served."""

    def __init__(self, app: Any, calls: int) -> None:
        self._app = app
        self._free = calls

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """A call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not self._free:
            await send({"type": "http.response.start", "status": 503, "headers": []})
            await send({"type": "http.response.body"})
            return
        self._free -= 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._free += 1


def main() -> None:
    """Serves until it is killed."""
    told = options()
    api = Speaker(max_batch_size=told.rows, stream=True, loop=ContinuousBatchingLoop())
    middlewares = [(AtMost, {"calls": told.calls})] if told.calls else []
    server = LitServer(api, accelerator="cpu", timeout=60, fast_queue=True, middlewares=middlewares)
    server.run(host=told.host, port=told.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
