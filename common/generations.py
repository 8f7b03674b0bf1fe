"""What is kept has generations, in the cache's store: whoever keeps speech forgets it when they change."""

from __future__ import annotations

import secrets
from typing import TypeAlias

from common.store import Store

GENERATIONS = "cache:generations"
GENERATION_SECONDS = 1.0
"""How long a change may go unnoticed."""

Generations: TypeAlias = dict[bytes, bytes]


async def read_generations(store: Store) -> Generations:
    """The generations. A store that has forgotten them gets new ones, so that nothing of before is found again.

    Raises:
        StoreUnavailable: the store does not answer.
    """
    generations: Generations = await store.command("HGETALL", GENERATIONS)
    if b"all" not in generations:
        await store.command("HSETNX", GENERATIONS, "all", secrets.randbelow(2**48))
        generations = await store.command("HGETALL", GENERATIONS)
    return generations
