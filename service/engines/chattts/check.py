"""Whether a folder holds a checkpoint that the engine can compute with; if not, what is wrong and what to do.

Only the headers of the tensor files are read here, except for checksums. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from operator import index
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from common.errors import StartupError
from service.engines.chattts.checkpoint import (
    ASSETS,
    CONFIG,
    DECODER,
    DVAE,
    EMBED,
    FILES,
    GPT,
    VOCOS,
    ConvNet,
    Dimensions,
    Shapes,
    Size,
    Vocoder,
    decoder_shapes,
    embed_shapes,
    gpt_shapes,
    vocos_shapes,
)
from service.engines.chattts.package import published_sums

FLOATS = frozenset({"F32", "F16", "BF16"})
FETCH = "fetch it again from https://huggingface.co/2Noise/ChatTTS"
FAULTS = 3
"""Faults of one kind that a message names; of the others it tells the number."""


def check_checkpoint(folder: Path, *, check_sums: bool) -> tuple[Dimensions, str]:
    """Checks all that can be checked without loading.

    Args:
        folder: what has the folder `asset`.
        check_sums: refuse weights other than the published ones.

    Returns:
        The transformer's sizes, and the weights' revision: a digest of all files.

    Raises:
        StartupError: says what is wrong and what to do.
    """
    _check_files(folder)
    dimensions = read_dimensions(folder)
    _compare(folder / EMBED, lambda _: embed_shapes(dimensions))
    _compare(folder / GPT, lambda _: gpt_shapes(dimensions), ignored={"embed_tokens.weight"})
    _compare(folder / DECODER, lambda shapes: decoder_shapes(_convnet(shapes, "decoder")))
    _compare(folder / VOCOS, lambda shapes: vocos_shapes(_vocoder(shapes)))
    frame = read_shapes(folder / DECODER)["decoder.conv_in.0.weight"][1]
    if dimensions.hidden != 2 * frame:
        raise StartupError(
            f"{folder / DECODER} takes frames of {frame} numbers, but hidden states of {folder / GPT} are"
            f" {dimensions.hidden} wide, which are two frames: the files are of different checkpoints; {FETCH}"
        )
    sums = file_sums(folder)
    if check_sums:
        _check_sums(folder, sums)
    return dimensions, hashlib.sha256("".join(sums.values()).encode()).hexdigest()[:12]


def file_sums(folder: Path, files: Sequence[str] = FILES) -> dict[str, str]:
    """SHA-256 sums, named as upstream does: `asset/gpt/config.json` is `sha256_asset_gpt_config_json`.

    Raises:
        StartupError: a file cannot be read.
    """
    with ThreadPoolExecutor() as pool:
        sums = pool.map(lambda name: _file_sum(folder / name), files)
        names = ("sha256_" + name.replace("/", "_").replace(".", "_") for name in files)
        return dict(zip(names, sums, strict=True))


def read_size(folder: Path) -> Size:
    """All sizes of a checkpoint that also has upstream's `DVAE`.

    Raises:
        StartupError: a file cannot be read.
        KeyError: a tensor is missing.
    """
    dvae = read_shapes(folder / DVAE)
    return Size(
        gpt=read_dimensions(folder),
        decoder=_convnet(read_shapes(folder / DECODER), "decoder"),
        vocos=_vocoder(read_shapes(folder / VOCOS)),
        dvae_encoder=_convnet(dvae, "encoder"),
        dvae_decoder=_convnet(dvae, "decoder"),
    )


def read_dimensions(folder: Path) -> Dimensions:
    """Sizes of transformer and embeddings, and that it is a transformer as the engine computes it.

    Raises:
        StartupError: the configuration is not that of a Llama model, or embeddings are missing.
    """
    path = folder / CONFIG
    config = _read_config(path)
    shapes = read_shapes(folder / EMBED)
    try:
        hidden, heads = index(config["hidden_size"]), index(config["num_attention_heads"])
        return Dimensions(
            hidden=hidden,
            layers=index(config["num_hidden_layers"]),
            heads=heads,
            head_dim=index(config.get("head_dim") or hidden // heads),
            ffn=index(config["intermediate_size"]),
            max_positions=index(config["max_position_embeddings"]),
            rope_theta=float(config.get("rope_theta", 10000.0)),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            codebooks=_count(shapes, "emb_code.{}.weight"),
            audio_vocabulary=shapes["emb_code.0.weight"][0],
            text_vocabulary=shapes["emb_text.weight"][0],
        )
    except KeyError as error:
        raise StartupError(f"{path} and {folder / EMBED} lack {error}; {FETCH}") from None
    except (TypeError, ValueError, ZeroDivisionError, IndexError) as error:
        raise StartupError(f"{path} has sizes that are none ({error}); {FETCH}") from None


def read_shapes(path: Path) -> Shapes:
    """Shapes of a file's tensors.

    Raises:
        StartupError: it is no safetensors file, or only a part of one.
    """
    return {name: shape for name, (_, shape) in _header(path).items()}


def _check_files(folder: Path) -> None:
    missing = [name for name in FILES if not os.path.isfile(folder / name)]  # unlike Path.is_file, it never raises
    if not missing:
        return
    if not folder.is_dir():
        raise StartupError(f"chattts.folder: {folder} is no folder")
    if len(missing) < len(FILES):
        raise StartupError(f"{folder} lacks {', '.join(missing)}; {FETCH}")
    if (folder / "gpt").is_dir():
        todo = f"name {folder.parent}" if folder.name == ASSETS else f"move its files into a folder {ASSETS} in it"
        raise StartupError(f"chattts.folder: {folder} is itself what should be the folder {ASSETS} in it; {todo}")
    if any(chain(folder.glob("*.pt"), folder.glob("*/*.pt"))):
        raise StartupError(
            f"{folder} has .pt files, from before ChatTTS 0.2: they may run code and are not read; {FETCH}"
        )
    raise StartupError(
        f"{folder} has no ChatTTS weights: it should have {CONFIG} and so on; copy the folder {ASSETS} of"
        " https://huggingface.co/2Noise/ChatTTS into it, or unset chattts.folder to have it fetched"
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} cannot be read: {error}; {FETCH}") from None
    if not isinstance(config, dict):
        raise StartupError(f"{path} is not the configuration of a model; {FETCH}")
    heads = config.get("num_attention_heads")
    known = {
        "model_type": "llama",
        "hidden_act": "silu",
        "num_key_value_heads": heads,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
    }
    for name, value in known.items():
        if (found := config.get(name, value)) != value:
            raise StartupError(f"{path} has {name} = {found!r}, and this engine computes only {value!r}; {FETCH}")
    return config


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names → type and shape."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error}") from None
    except SafetensorError as error:
        if _is_pointer(path):
            raise StartupError(f"{path} is only Git LFS's pointer to the file; run `git lfs pull` in there") from None
        raise StartupError(f"{path} is not a whole safetensors file ({error}); {FETCH}") from None


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def _compare(path: Path, wanted_for: Callable[[Shapes], Shapes], ignored: Collection[str] = ()) -> None:
    """Compares what a file has with what it should have.

    Args:
        path: of the file.
        wanted_for: the shapes it should have, given those it has.
        ignored: tensors that may be there and are not used.
    """
    header = {name: tensor for name, tensor in _header(path).items() if name not in ignored}
    try:
        wanted = wanted_for({name: shape for name, (_, shape) in header.items()})
    except (KeyError, ValueError) as error:
        raise StartupError(f"{path} lacks a tensor, or one has a wrong shape: {error}; {FETCH}") from None
    faults = [f"{name} is missing" for name in wanted if name not in header]
    faults += [f"{name} does not belong there" for name in header if name not in wanted]
    for name, (dtype, shape) in header.items():
        if shape != wanted.get(name, shape):
            faults.append(f"{name} is {list(shape)} and should be {list(wanted[name])}")
        if dtype not in FLOATS:
            faults.append(f"{name} is {dtype} and should be one of {', '.join(sorted(FLOATS))}")
    if faults:
        raise StartupError(f"{path} is not of a ChatTTS checkpoint as {CONFIG} describes it: {_some(faults)}; {FETCH}")


def _check_sums(folder: Path, sums: dict[str, str]) -> None:
    published = published_sums()
    others = [name for name, key in zip(FILES, sums, strict=True) if sums[key] != published.get(key)]
    if others:
        raise StartupError(
            f"{folder} has files that are damaged or not the published ones, by their checksums: {', '.join(others)};"
            f" {FETCH}, or set chattts.check_sums=false for weights of your own"
        )


def _file_sum(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error}") from None


def _convnet(shapes: Shapes, name: str) -> ConvNet:
    bottleneck, inputs, _ = shapes[f"{name}.conv_in.0.weight"]
    outputs, hidden, _ = shapes[f"{name}.conv_out.weight"]
    return ConvNet(inputs, outputs, bottleneck, hidden, _count(shapes, name + ".decoder_block.{}.weight"))


def _vocoder(shapes: Shapes) -> Vocoder:
    ffn, width = shapes["backbone.convnext.0.pwconv1.weight"]
    return Vocoder(width, ffn, _count(shapes, "backbone.convnext.{}.gamma"))


def _count(shapes: Shapes, name: str) -> int:
    """How many there are of a numbered tensor."""
    return next(n for n in range(len(shapes) + 1) if name.format(n) not in shapes)


def _some(faults: list[str]) -> str:
    named = "; ".join(islice(faults, FAULTS))
    return named if len(faults) <= FAULTS else f"{named}; and {len(faults) - FAULTS} more"
