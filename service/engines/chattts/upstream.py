"""Unmodified upstream with a checkpoint loaded: the reference of tests and benchmarks. Serving never imports this."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pybase16384

from common.errors import StartupError
from service.engines.chattts.check import file_sums, read_size
from service.engines.chattts.checkpoint import DVAE, FILES, ConvNet
from service.engines.chattts.package import speaker_statistics


def import_chattts() -> Any:
    """The package `ChatTTS`, also where torchaudio's compiled extension does not load.

    PyPI's torchaudio wants CUDA libraries, which are not there beside a CPU torch. ChatTTS needs only those parts of it
    that are pure Python, so a stand-in takes the extension's place, and only where that itself fails.
    """
    try:
        import torchaudio  # noqa: F401
    except OSError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
        sys.modules["torchaudio._extension"] = _Extension("torchaudio._extension")
    import ChatTTS

    return ChatTTS


class _Extension(ModuleType):
    """What torchaudio's Python code asks of `torchaudio._extension`, where nothing is compiled."""

    _IS_TORCHAUDIO_EXT_AVAILABLE = False

    @staticmethod
    def fail_if_no_align(function: object) -> object:
        """The alignment functions fail when they are called, and nothing here calls them."""
        return function


def load_upstream(folder: Path, device: str = "cpu") -> Any:
    """A `ChatTTS.Chat` on a checkpoint of any size.

    Upstream knows one size and one set of checksums; both stand on the instance, from where it reads them.

    Raises:
        StartupError: upstream refuses the checkpoint.
    """
    import torch

    chat = import_chattts().Chat()
    chat.config = copy.deepcopy(chat.config)  # its parts are shared between all instances
    _fit(chat.config, folder)
    chat.sha256_map = file_sums(folder, (*FILES, DVAE))
    if not chat.load(source="custom", custom_path=str(folder), device=torch.device(device)):
        raise StartupError(f"upstream does not load {folder}: its log says why")
    return chat


def _fit(config: Any, folder: Path) -> None:
    """Tells upstream's `Config` the sizes of a checkpoint."""
    size = read_size(folder)
    for part in (config.gpt, config.embed):
        part.hidden_size = size.gpt.hidden
        part.num_audio_tokens, part.num_text_tokens = size.gpt.audio_vocabulary, size.gpt.text_vocabulary
        part.num_vq = size.gpt.codebooks
    _fit_convnet(config.decoder, size.decoder)
    _fit_convnet(config.dvae.encoder, size.dvae_encoder)
    _fit_convnet(config.dvae.decoder, size.dvae_decoder)
    config.dvae.vq.dim = size.dvae_encoder.outputs
    backbone, head = config.vocos.backbone.init_args, config.vocos.head.init_args
    backbone.dim = head.dim = size.vocos.width
    backbone.intermediate_dim, backbone.num_layers = size.vocos.ffn, size.vocos.blocks
    statistics = np.concatenate(speaker_statistics(size.gpt.hidden))
    config.spk_stat = pybase16384.encode_to_string(statistics.tobytes())


def _fit_convnet(part: Any, size: ConvNet) -> None:
    part.idim, part.odim, part.bn_dim = size.inputs, size.outputs, size.bottleneck
    part.hidden, part.n_layer = size.hidden, size.blocks
