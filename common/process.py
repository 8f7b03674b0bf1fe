"""What a process asks of its operating system."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
SWITCH_SECONDS = 0.0002
"""How long a thread may keep Python's lock while others want it."""


def calm_garbage_collector() -> None:
    """Called once all is imported. What lives now lives for ever.

    Each call leaves five to ten circular objects of gRPC's own, and more if it was aborted (its traceback leads back to
    it). Of those that were old when their call ended, what 20,000 calls leave is what may lie around.
    """
    gc.freeze()
    gc.set_threshold(20_000, 10, 6)


def exit_with_parent(parent: int) -> None:
    """Has this process told to stop when its parent dies, however it dies. Does nothing where there is no Linux.

    `parent`: the id of the process that started this one, in its own words: by now it may be dead.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)
    if os.getppid() != parent:
        sys.exit(0)
