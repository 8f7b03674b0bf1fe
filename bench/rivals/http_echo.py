"""A bare HTTP server (aiohttp on uvloop), the yardstick of those that speak HTTP: the same bytes for every call."""

from __future__ import annotations

import argparse

import uvloop
from aiohttp import web


def main() -> None:
    """Serves until it is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--bytes", type=int, required=True)
    args = parser.parse_args()
    body = bytes(args.bytes)
    host, _, port = args.address.rpartition(":")

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=body, content_type="application/octet-stream")

    app = web.Application()
    app.router.add_post("/", answer)
    web.run_app(app, host=host, port=int(port), print=None, loop=uvloop.new_event_loop())


if __name__ == "__main__":
    main()
