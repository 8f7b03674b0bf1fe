"""What Chorus reads from the installed ChatTTS package, without importing it.

`import ChatTTS` loads torchaudio, numba, vocos and transformers' models, none of which serving needs. Its data are a
plain module and JSON files, so they are read as files.
"""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pybase16384
from numpy.typing import NDArray

from common.errors import StartupError


def speaker_statistics(hidden: int) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Standard deviation and mean of speaker vectors, [hidden] each, from `Config.spk_stat`.

    A model narrower than the published one (768), as tests use, has the first `hidden` of each.

    Raises:
        StartupError: the package is not installed, or is another version than the one that Chorus knows.
    """
    try:
        packed = np.frombuffer(pybase16384.decode_from_string(_config().spk_stat), dtype=np.float16)
        std, mean = np.split(packed, 2)
    except (AttributeError, ValueError) as error:
        raise StartupError(f"the ChatTTS package has no speaker statistics where 0.2.5 has them: {error}") from None
    if len(std) < hidden:
        raise StartupError(f"the ChatTTS package describes speakers by {len(std)} numbers, but the weights by {hidden}")
    return std[:hidden].copy(), mean[:hidden].copy()


def published_sums() -> dict[str, str]:
    """SHA-256 sums of the published weights by file name, from `res/sha256_map.json`: `asset/gpt/config.json` → hex.

    Raises:
        StartupError: the package is not installed, or is another version than the one that Chorus knows.
    """
    folder = _package()
    try:
        sums: dict[str, str] = json.loads((folder / "res" / "sha256_map.json").read_bytes())
    except (OSError, ValueError) as error:
        raise StartupError(f"the ChatTTS package has no checksums where 0.2.5 has them: {error}") from None
    return sums


def sum_key(file: str) -> str:
    """How `published_sums` names a file: `asset/gpt/config.json` is `sha256_asset_gpt_config_json`."""
    return "sha256_" + file.replace("/", "_").replace(".", "_")


@cache
def _config() -> Any:
    spec = importlib.util.spec_from_file_location("_chattts_config", _package() / "config" / "config.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Config


@cache
def _package() -> Path:
    """The package's folder. Finding it runs none of its code."""
    spec = importlib.util.find_spec("ChatTTS")
    if spec is None or not spec.submodule_search_locations:
        raise StartupError("the ChatTTS package is not installed: pip install -c constraints.txt '.[chattts]'")
    return Path(spec.submodule_search_locations[0])
