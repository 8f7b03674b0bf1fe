"""LitServe: FastAPI before a worker process; batches of whole utterances."""

# No `from __future__ import annotations`: LitServe reads the annotations of these methods, and wants no strings.
from collections.abc import Sequence

from fastapi import Request, Response
from litserve import LitAPI, LitServer

from bench.offered import COMPRESSION, MEAN_SECONDS, QUEUE_SHARE, UNARY_SECONDS, UNARY_SHARE
from bench.rivals.engines import WholeUtteranceEngine
from bench.rivals.options import options
from common.settings import load_settings

TIMEOUT = QUEUE_SHARE * (UNARY_SECONDS + UNARY_SHARE * MEAN_SECONDS) / COMPRESSION
"""In the queue: LitServe has nothing else that bounds it."""


class Speaker(LitAPI):
    """The engine."""

    def setup(self, device: object) -> None:
        """In the worker."""
        self.engine = WholeUtteranceEngine(load_settings().tone)

    def decode_request(self, request: Request) -> str:
        """The text. `Request` tells LitServe to read JSON; what comes is what was in it."""
        text: str = request["text"]
        return text

    def batch(self, inputs: Sequence[str]) -> Sequence[str]:
        """As they are."""
        return inputs

    def predict(self, texts: Sequence[str]) -> list[bytes]:
        """A batch."""
        return self.engine.speak(texts)

    def unbatch(self, output: Sequence[bytes]) -> Sequence[bytes]:
        """As they are."""
        return output

    def encode_response(self, output: bytes) -> Response:
        """Samples as they are."""
        return Response(output, media_type="application/octet-stream")


def main() -> None:
    """Serves until it is killed."""
    told = options()
    api = Speaker(max_batch_size=told.rows, batch_timeout=told.wait_seconds)
    server = LitServer(api, accelerator="cpu", timeout=TIMEOUT, fast_queue=True)
    server.run(host=told.host, port=told.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
