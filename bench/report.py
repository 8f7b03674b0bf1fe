"""What every report says of where it came from."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime

from bench.processes import ROOT


def metadata() -> dict[str, str | float]:
    """Commit, date, Python and cores."""
    return {
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "cores": os.cpu_count() or 0,
    }


def commit() -> str:
    """The commit, with `-dirty` where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def quantile(values: list[float], share: float) -> float:
    """The value that this share of all are not above; 0 where there is none."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0
