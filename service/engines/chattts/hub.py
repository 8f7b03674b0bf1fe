"""The published weights, fetched from the Hugging Face hub once and kept."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from common.errors import StartupError
from common.settings import ChatTTSSettings
from service.engines.chattts.checkpoint import FILES

REPOSITORY = "2Noise/ChatTTS"

BY_HAND = (
    f"Where there is a network, run `hf download {REPOSITORY} --include 'asset/*' --local-dir chattts`, bring that"
    " folder here, and start with CHORUS_CHATTTS_FOLDER=chattts. HF_ENDPOINT can name a mirror of the hub. Speech"
    " without a model needs no weights: CHORUS_ENGINE=espeak"
)


def find_checkpoint(settings: ChatTTSSettings) -> Path:
    """The folder that the settings name; without one, the published weights.

    Raises:
        StartupError: they are not on this machine and cannot be fetched.
    """
    return settings.folder or fetch(settings.cache)


def fetch(cache: Path | None = None) -> Path:
    """The published weights: from the cache if all are there, else fetched, 1.1 GB, with a progress bar.

    A fetch that was cut off goes on where it stopped. Once they are there, no start needs a network.

    Args:
        cache: where they are kept. None: where the hub's own tools keep them (HF_HOME).

    Returns:
        The folder that has `asset` in it.

    Raises:
        StartupError: they cannot be fetched; says why, and how to bring them by hand.
    """
    try:
        if (folder := _snapshot(cache, offline=True)) is not None:
            return folder
        folder = _snapshot(cache, offline=False)
    except Exception as error:  # its HTTP library differs between versions, and the disk may be full
        reason = str(error.__cause__ or error)
        raise StartupError(f"the weights of {REPOSITORY} cannot be fetched: {reason}\n{BY_HAND}") from error
    if folder is None:  # without a network, the hub's client is content with a part of them
        raise StartupError(
            f"the weights of {REPOSITORY} are here only in part, and the rest cannot be fetched\n{BY_HAND}"
        )
    return folder


def _snapshot(cache: Path | None, *, offline: bool) -> Path | None:
    """The newest snapshot of the repository, if it is whole."""
    try:
        folder = Path(
            snapshot_download(REPOSITORY, allow_patterns=list(FILES), cache_dir=cache, local_files_only=offline)
        )
    except FileNotFoundError:
        if offline:
            return None
        raise
    return folder if all((folder / name).is_file() for name in FILES) else None
