"""Upstream's own Decoder and Vocos, unmodified, as the reference: whole utterances at once."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from service.engines.chattts.checkpoint import DECODER, SIZES, VOCOS, Size, make_checkpoint
from service.engines.chattts.upstream import import_chattts

Tensors = dict[str, Tensor]


def checkpoint(folder: Path, size: Size = SIZES["tiny"], *, stress: bool = False) -> tuple[Tensors, Tensors]:
    """Random weights of Decoder and Vocos in fp32."""
    make_checkpoint(folder, size, stress=stress)
    return load_file(folder / DECODER), load_file(folder / VOCOS)


class Upstream:
    """`Chat._decode_to_wavs` of one utterance, in the weights' type.

    Args:
        decoder: tensors of Decoder.
        vocos: tensors of Vocos.
    """

    def __init__(self, decoder: Tensors, vocos: Tensors) -> None:
        import_chattts()
        from ChatTTS.config import Config
        from ChatTTS.model.dvae import DVAE
        from vocos import Vocos
        from vocos.pretrained import instantiate_class

        width, inputs, _ = decoder["decoder.conv_in.2.weight"].shape
        frame = decoder["decoder.conv_in.0.weight"].shape[1]
        blocks = sum(name.endswith("dwconv.bias") for name in decoder)
        config = {"idim": frame, "odim": frame, "hidden": width, "n_layer": blocks, "bn_dim": inputs}
        parts: dict[str, Any] = asdict(Config().vocos)
        wide, channels = vocos["backbone.convnext.0.pwconv1.weight"].shape
        parts["backbone"]["init_args"] |= {"dim": channels, "intermediate_dim": wide}
        parts["head"]["init_args"]["dim"] = channels
        dtype = decoder["coef"].dtype
        self.decoder = DVAE(decoder_config=config, dim=frame).to(dtype).eval()
        self.decoder.load_state_dict(decoder)
        self.vocos = Vocos(*(instantiate_class(args=(), init=part) for part in parts.values())).to(dtype).eval()
        self.vocos.load_state_dict(vocos)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[steps, hidden] → [samples]."""
        return self.batch(hidden.unsqueeze(0))[0]

    @torch.inference_mode()
    def batch(self, hidden: Tensor) -> Tensor:
        """[rows, steps, hidden] → [rows, samples]."""
        waves: Tensor = self.vocos.decode(self.decoder(hidden.transpose(1, 2).contiguous()))
        return waves


def decibels(ours: Tensor, theirs: Tensor) -> float:
    """The error in dB of the reference's power."""
    error = (ours.double() - theirs.double()).square().sum() / theirs.double().square().sum()
    return float(10 * torch.log10(error + 1e-40))
