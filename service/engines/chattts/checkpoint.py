"""A ChatTTS checkpoint on disk: files, tensor names and shapes; and a maker of checkpoints with random weights.

The layout is the one that ChatTTS 0.2.5 loads (`core.py`, `utils/dl.py`, `model/embed.py`, `model/dvae.py`) and
that the hub's `2Noise/ChatTTS` has. Random checkpoints are for tests and benchmarks: unmodified upstream loads them
too, and they give noise of natural lengths.

    python -m service.engines.chattts.checkpoint DIR --size tiny
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import numpy as np
import typer
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

ASSETS = "asset"
CONFIG = f"{ASSETS}/gpt/config.json"
GPT = f"{ASSETS}/gpt/model.safetensors"
EMBED = f"{ASSETS}/Embed.safetensors"
DECODER = f"{ASSETS}/Decoder.safetensors"
VOCOS = f"{ASSETS}/Vocos.safetensors"
DVAE = f"{ASSETS}/DVAE.safetensors"
TOKENIZER = f"{ASSETS}/tokenizer"
TOKENIZER_FILES = tuple(
    f"{TOKENIZER}/{name}" for name in ("special_tokens_map.json", "tokenizer_config.json", "tokenizer.json")
)
FILES = (CONFIG, GPT, EMBED, DECODER, VOCOS, *TOKENIZER_FILES)
"""What Chorus reads. Upstream wants `DVAE` too, which serves only to listen to reference audio."""

MELS = 100
FFT = 1024
"""Upstream's code has these two as constants (`model/dvae.py`, `config/config.py`)."""

BASE_VOCABULARY = 21128
SPECIAL_TOKENS = (
    *("[Sasr]", "[Pasr]", "[Easr]", "[Stts]", "[Ptts]", "[Etts]", "[Sbreak]", "[Pbreak]", "[Ebreak]"),
    *("[uv_break]", "[v_break]", "[lbreak]", "[llbreak]", "[undefine]", "[laugh]", "[spk_emb]", "[empty_spk]"),
    *("[music]", "[pure]", *(f"[break_{n}]" for n in range(8)), *(f"[laugh_{n}]" for n in range(3))),
    *(f"[oral_{n}]" for n in range(10)),
    *(f"[speed_{n}]" for n in range(10)),
)
"""In the order of their ids, from 21128 on."""

Array: TypeAlias = NDArray[np.float32]
Shapes: TypeAlias = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Sizes of the transformer and its embeddings, from `gpt/config.json` and the tensors of both files."""

    hidden: int
    layers: int
    heads: int
    head_dim: int
    ffn: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    codebooks: int
    audio_vocabulary: int
    """Codes of a codebook, and behind them the one that ends a row."""
    text_vocabulary: int


@dataclass(frozen=True, slots=True)
class ConvNet:
    """Sizes of a stack of dilated ConvNeXt blocks: upstream's `DVAEDecoder`."""

    inputs: int
    outputs: int
    bottleneck: int
    hidden: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Vocoder:
    """Sizes of Vocos."""

    width: int
    ffn: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of a whole checkpoint."""

    gpt: Dimensions
    decoder: ConvNet
    vocos: Vocoder
    dvae_encoder: ConvNet
    dvae_decoder: ConvNet


def _size(hidden: int, layers: int, heads: int, ffn: int, blocks: int, width: int, vocos: Vocoder) -> Size:
    """A size that obeys upstream: a hidden state is two frames of the decoder, and a code two of the DVAE's."""
    text = BASE_VOCABULARY + len(SPECIAL_TOKENS)
    frame, bottleneck = hidden // 2, width // 4
    code = 4 * frame // 3
    return Size(
        gpt=Dimensions(hidden, layers, heads, hidden // heads, ffn, 4096, 10000.0, 1e-6, 4, 626, text),
        decoder=ConvNet(frame, frame, bottleneck, width, blocks),
        vocos=vocos,
        dvae_encoder=ConvNet(code, 2 * code, bottleneck, width // 2, blocks),
        dvae_decoder=ConvNet(code, code, bottleneck, width // 2, blocks),
    )


SIZES: Mapping[str, Size] = {
    "full": _size(768, 20, 12, 3072, blocks=12, width=512, vocos=Vocoder(512, 1536, 8)),
    # Blocks of Decoder and Vocos are as many as in full size: their number is the reach of the context.
    "tiny": _size(48, 3, 3, 96, blocks=12, width=32, vocos=Vocoder(32, 64, 8)),
}


def gpt_shapes(size: Dimensions) -> Shapes:
    """Tensors of `gpt/model.safetensors`: a LlamaModel without its token embedding."""
    inner, hidden, ffn = size.heads * size.head_dim, size.hidden, size.ffn
    shapes: Shapes = {"norm.weight": (hidden,)}
    for layer in (f"layers.{n}" for n in range(size.layers)):
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (inner, hidden) for name in "qkv"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, inner)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, ffn)
        shapes |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes


def embed_shapes(size: Dimensions) -> Shapes:
    """Tensors of `Embed.safetensors`. In weight-normed heads `original0` are lengths, `original1` directions."""
    shapes: Shapes = {"emb_text.weight": (size.text_vocabulary, size.hidden)}
    heads = {"head_text": size.text_vocabulary}
    for n in range(size.codebooks):
        shapes[f"emb_code.{n}.weight"] = (size.audio_vocabulary, size.hidden)
        heads[f"head_code.{n}"] = size.audio_vocabulary
    for head, rows in heads.items():
        shapes[f"{head}.parametrizations.weight.original0"] = (rows, 1)
        shapes[f"{head}.parametrizations.weight.original1"] = (rows, size.hidden)
    return shapes


def decoder_shapes(size: ConvNet) -> Shapes:
    """Tensors of `Decoder.safetensors`."""
    return {
        "coef": (1, MELS, 1),
        **_convnet_shapes("decoder", size),
        "out_conv.weight": (MELS, size.inputs, 3),
    }


def vocos_shapes(size: Vocoder) -> Shapes:
    """Tensors of `Vocos.safetensors`."""
    shapes: Shapes = {
        **_mel_shapes("feature_extractor"),
        **_layer_shapes("backbone.embed", size.width, MELS, 7),
        **_norm_shapes("backbone.norm", size.width),
        **_norm_shapes("backbone.final_layer_norm", size.width),
        **_layer_shapes("head.out", FFT + 2, size.width),
        "head.istft.window": (FFT,),
    }
    for n in range(size.blocks):
        shapes |= _block_shapes(f"backbone.convnext.{n}", "gamma", size.width, size.ffn)
    return shapes


def dvae_shapes(encoder: ConvNet, decoder: ConvNet) -> Shapes:
    """Tensors of `DVAE.safetensors`, as vector_quantize_pytorch 1.17.8 names them."""
    width, half, levels = decoder.inputs, encoder.outputs // 2, 4
    shapes: Shapes = {
        **_layer_shapes("downsample_conv.0", width, MELS, 3),
        **_layer_shapes("downsample_conv.2", width, width, 4),
        **_mel_shapes("preprocessor_mel"),
        **_convnet_shapes("encoder", encoder),
        **decoder_shapes(decoder),
    }
    for group in (f"vq_layer.quantizer.rvqs.{n}" for n in range(2)):
        shapes |= _layer_shapes(f"{group}.project_in", levels, half) | _layer_shapes(
            f"{group}.project_out", half, levels
        )
    return shapes


def _convnet_shapes(name: str, size: ConvNet) -> Shapes:
    shapes: Shapes = {
        **_layer_shapes(f"{name}.conv_in.0", size.bottleneck, size.inputs, 3),
        **_layer_shapes(f"{name}.conv_in.2", size.hidden, size.bottleneck, 3),
        f"{name}.conv_out.weight": (size.outputs, size.hidden, 1),
    }
    for n in range(size.blocks):
        shapes |= _block_shapes(f"{name}.decoder_block.{n}", "weight", size.hidden, 4 * size.hidden)
    return shapes


def _block_shapes(name: str, scale: str, width: int, ffn: int) -> Shapes:
    return {
        f"{name}.{scale}": (width,),
        **_layer_shapes(f"{name}.dwconv", width, 1, 7),
        **_norm_shapes(f"{name}.norm", width),
        **_layer_shapes(f"{name}.pwconv1", ffn, width),
        **_layer_shapes(f"{name}.pwconv2", width, ffn),
    }


def _layer_shapes(name: str, outputs: int, *inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, *inputs), f"{name}.bias": (outputs,)}


def _norm_shapes(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _mel_shapes(name: str) -> Shapes:
    return {f"{name}.mel_spec.spectrogram.window": (FFT,), f"{name}.mel_spec.mel_scale.fb": (FFT // 2 + 1, MELS)}


def make_checkpoint(folder: Path, size: Size, seed: int = 0, *, stress: bool = False) -> None:
    """Writes a checkpoint with random weights in fp32, the same for the same arguments.

    Full size is 1.1 GB.

    Args:
        folder: made where it does not exist; its files are overwritten.
        size: of `SIZES`, or your own.
        seed: another one gives other weights.
        stress: every tap of the vocoder's context matters: see `_one_sided`. A freshly initialised Decoder is nearly
            the identity and cannot show whether a context is too short.
    """
    for name in (GPT, TOKENIZER):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(_config(size.gpt), indent=2) + "\n")
    _write_tokenizer(folder / TOKENIZER)
    for file, shapes in _shapes(size):
        tensors = {name: _values(f"{seed}/{file}/{name}", name, shape) for name, shape in shapes.items()}
        if stress and file in (DECODER, VOCOS):
            tensors = {name: _one_sided(name, values) for name, values in tensors.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})


def _shapes(size: Size) -> Iterator[tuple[str, Shapes]]:
    yield GPT, gpt_shapes(size.gpt)
    yield EMBED, embed_shapes(size.gpt)
    yield DECODER, decoder_shapes(size.decoder)
    yield VOCOS, vocos_shapes(size.vocos)
    yield DVAE, dvae_shapes(size.dvae_encoder, size.dvae_decoder)


_SCALE = re.compile(r"(?:decoder_block|convnext)\.(\d+)\.(?:weight|gamma)$")


def _values(stream: str, name: str, shape: tuple[int, ...]) -> Array:
    """Random values for a tensor, in a scale that keeps activations near 1 and lets tokens and positions matter.

    Args:
        stream: what tells this tensor's numbers from all others'.
        name: of the tensor, by which it is known what it does.
        shape: of the tensor.
    """
    if name.endswith("window"):
        return np.hanning(shape[0] + 1)[:-1].astype(np.float32)
    # crc32, since Python's own hash differs between processes.
    noise = np.random.Generator(np.random.PCG64(zlib.crc32(stream.encode()))).standard_normal(shape, dtype=np.float32)
    if name.endswith((".fb", "coef")):
        return np.abs(noise)
    if _SCALE.search(name):
        return 0.3 * (1 + 0.1 * noise)
    if name.endswith(("norm.weight", "original0")):
        return 1 + 0.1 * noise
    if name.endswith("bias"):
        return 0.1 * noise
    if name.startswith("emb_"):
        return noise
    noise /= np.float32(math.sqrt(math.prod(shape[1:])))
    return noise


def _one_sided(name: str, values: Array) -> Array:
    """The stress form of a tensor of Decoder or Vocos.

    The first half of all channels hears only the earliest tap of each convolution and the second half only the latest,
    and the halves are not mixed before the head. So what is furthest away in the past and in the future arrives by one
    path, which no nearer tap dilutes. Scales grow threefold from block to block, so that each block outweighs what the
    residual path brings past it.
    """
    if scale := _SCALE.search(name):
        return values / 0.3 * np.float32(3.0 ** int(scale[1]))
    if values.ndim < 2 or name.startswith("head") or name.endswith((".fb", "coef")):
        return values
    # A depthwise convolution has one input, which both halves take.
    outputs, inputs = values.shape[0] // 2, values.shape[1] // 2
    early: tuple[slice, ...] = (slice(outputs), slice(max(inputs, 1)))
    late: tuple[slice, ...] = (slice(outputs, None), slice(inputs, None))
    if values.ndim == 3:
        early, late = (*early, slice(1)), (*late, slice(-1, None))
    kept = np.zeros_like(values)
    kept[early], kept[late] = values[early], values[late]
    return kept * np.float32(math.sqrt(values.size / np.count_nonzero(kept)))


def _config(size: Dimensions) -> dict[str, object]:
    """`gpt/config.json`: what LlamaModel is built from."""
    return {
        "architectures": ["LlamaModel"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "max_position_embeddings": size.max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": size.heads,
        "num_audio_tokens": size.audio_vocabulary,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.heads,
        "num_text_tokens": size.text_vocabulary,
        "num_vq": size.codebooks,
        "rms_norm_eps": size.norm_eps,
        "rope_scaling": None,
        "rope_theta": size.rope_theta,
        "torch_dtype": "float32",
        "use_cache": False,
        "vocab_size": 8,  # its embedding is in no file, and upstream deletes it
    }


def _vocabulary() -> list[str]:
    """`BASE_VOCABULARY` tokens in the manner of bert-base-chinese: special tokens where it has them, then pieces.

    Single characters and Chinese ones, pairs of letters, each also as what continues a word. The rest is unused.
    """
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    marks = [chr(code) for code in range(0x21, 0x7F) if not chr(code).isalpha()]
    pieces = [*letters, *(a + b for a in letters for b in letters), *"0123456789"]
    characters = [
        bytes((row, cell)).decode("gb2312", "ignore") for row in range(0xB0, 0xF8) for cell in range(0xA1, 0xFF)
    ]
    chinese = [character for character in characters if character]
    words = [*marks, *"，。、；：？！（）《》“”‘’…—·～", *letters, *pieces[26:-10], *chinese]
    words += [f"##{piece}" for piece in [*pieces, *chinese]]
    head = ["[PAD]", *(f"[unused{n}]" for n in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    unused = BASE_VOCABULARY - len(head) - len(words)
    return [*head, *words, *(f"[unused{100 + n}]" for n in range(unused))]


def _write_tokenizer(folder: Path) -> None:
    """What `BertTokenizerFast.save_pretrained` writes; by hand, since its files differ between versions."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    vocabulary = {token: number for number, token in enumerate(_vocabulary())}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=named["unk"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*named.values(), *SPECIAL_TOKENS)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {f"{kind}_token": token for kind, token in named.items()}
    special_map = {**special, "additional_special_tokens": list(SPECIAL_TOKENS)}
    config = {
        **special_map,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "tokenizer_class": "BertTokenizer",
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special_map, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _main(
    folder: Annotated[Path, typer.Argument(help="Where to write; made if need be.")],
    size: Annotated[
        Literal["full", "tiny"], typer.Option(help="full: 1.1 GB, as published. tiny: for tests.")
    ] = "tiny",
    seed: int = 0,
    stress: Annotated[bool, typer.Option(help="Every tap of the vocoder's context matters.")] = False,
) -> None:
    """Makes a checkpoint with random weights."""
    make_checkpoint(folder, SIZES[size], seed, stress=stress)


if __name__ == "__main__":
    typer.run(_main)
