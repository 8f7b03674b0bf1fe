"""Memory: how many rows there is room for, and how to tell that there is none left."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from common.errors import StartupError
from service.engines.chattts.gpt import slot_bytes
from service.engines.chattts.load import Weights

SHARE = 0.5
"""Of the free memory, for the cache of slots. The rest is for what is computed, and for rows yet to be vocoded."""
MOST_SLOTS = {"cpu": 32, "cuda": 256}
"""More rows than this gain little."""


def choose_slots(asked: int, length: int, weights: Weights) -> int:
    """Slots for the cache.

    Args:
        asked: as many; 0: as many as fit, up to `MOST_SLOTS`.
        length: tokens of a slot.
        weights: the model's, loaded.

    Raises:
        StartupError: not even one fits.
    """
    if asked:
        return asked
    each = slot_bytes(weights.dimensions, length, weights.dtype)
    fit = int(free_bytes(weights.device) * SHARE / each)
    if fit < 1:
        raise StartupError(f"a row takes {each / 2**20:.0f} MiB, and there is no room; set chattts.max_steps lower")
    return min(fit, MOST_SLOTS[weights.device.type])


def free_bytes(device: torch.device) -> int:
    """Memory that could be had now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    except OSError:  # not Linux: half of what is built in, at a guess
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of torch says so. On a CPU it has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
