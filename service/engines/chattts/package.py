"""What Chorus reads from the installed ChatTTS package, without importing it.

`import ChatTTS` loads torchaudio, numba, vocos and transformers' models, and serving needs none of them. The package's
data are JSON files and a module that imports nothing, so they are read as files.
"""

from __future__ import annotations

import json
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pybase16384
from numpy.typing import NDArray

from common.errors import StartupError

ADVICE = "install 0.2.5: pip install -c constraints.txt '.[service,chattts]'"


def speaker_statistics(hidden: int) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Standard deviation and mean of speaker vectors, [hidden] each, from `Config.spk_stat` (`config/config.py`).

    The published model has 768 of each. A narrower one, as tests use, has the first ones.

    Raises:
        StartupError: the package is missing or has them elsewhere, or the model is wider.
    """
    try:
        std, mean = np.split(np.frombuffer(pybase16384.decode_from_string(_config().spk_stat), dtype=np.float16), 2)
    except (AttributeError, OSError, ValueError) as error:
        raise StartupError(f"the ChatTTS package has no speaker statistics ({error}); {ADVICE}") from None
    if len(std) < hidden:
        raise StartupError(f"the ChatTTS package describes speakers by {len(std)} numbers, these weights by {hidden}")
    return std[:hidden].copy(), mean[:hidden].copy()


def published_sums() -> dict[str, str]:
    """SHA-256 sums of the published weights: `asset/gpt/config.json` is called `sha256_asset_gpt_config_json`.

    Raises:
        StartupError: the package is missing or has them elsewhere.
    """
    return _resource("sha256_map.json")


def homophones() -> dict[str, str]:
    """Chinese characters that the model misreads → characters that sound as they should.

    Raises:
        StartupError: the package is missing or has them elsewhere.
    """
    return _resource("homophones_map.json")


def _resource(name: str) -> dict[str, str]:
    try:
        table: dict[str, str] = json.loads((_package() / "res" / name).read_bytes())
    except (OSError, ValueError) as error:
        raise StartupError(f"the ChatTTS package has no {name} ({error}); {ADVICE}") from None
    return table


def _config() -> Any:
    spec = spec_from_file_location("_chattts_config", _package() / "config" / "config.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Config


def _package() -> Path:
    """The package's folder. To find it runs none of its code."""
    spec = find_spec("ChatTTS")
    if spec is None or not spec.submodule_search_locations:
        raise StartupError(f"the ChatTTS package is not installed; {ADVICE}")
    return Path(spec.submodule_search_locations[0])
