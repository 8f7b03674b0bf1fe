"""What `bench.gpu`'s stages have found, as one JSON object, and how Chorus compares with upstream.

    python -m bench.gpu_report RESULTS

Apart, so that it takes no seconds to import.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

STAGES = ("machine", "correct", "steps", "burst", "streams", "night", "upstream", "upstream_compiled")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="results")
    print(json.dumps(report(parser.parse_args().folder)))


def report(folder: Path) -> dict[str, Any]:
    """All stages. One that left nothing is `not measured`."""
    found: dict[str, Any] = {
        stage: json.loads(path.read_text()) if (path := folder / f"{stage}.json").exists() else "not measured"
        for stage in STAGES
    }
    for name in ("upstream", "upstream_compiled"):
        if "audio_s_per_s" in found[name] and "rounds" in found["burst"]:
            ours = max(each["audio_s_per_s"] for each in found["burst"]["rounds"])
            found[f"ratio_{name}"] = round(ours / found[name]["audio_s_per_s"], 2)
    return found


if __name__ == "__main__":
    main()
