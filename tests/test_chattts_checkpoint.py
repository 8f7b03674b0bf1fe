"""Random checkpoints are real ones but for their values: unmodified upstream is the judge."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from service.engines.chattts import checkpoint
from service.engines.chattts.check import file_sums, read_size
from service.engines.chattts.checkpoint import DECODER, DVAE, EMBED, FILES, GPT, SIZES, VOCOS, Shapes, make_checkpoint
from service.engines.chattts.upstream import import_chattts, load_upstream

FULL = SIZES["full"]
ALL_FILES = (*FILES, DVAE)


@pytest.mark.parametrize("size", SIZES)
def test_tensors_are_those_of_upstreams_own_modules(size: str, tiny_checkpoint: Path) -> None:
    """Names and shapes, for full size from upstream's default configuration, for tiny from the one we make it fit."""
    if size == "full":
        wanted = _modules(import_chattts().Chat().config)
    else:
        wanted = _modules(load_upstream(tiny_checkpoint).config)
    made = {file: dict(shapes) for file, shapes in checkpoint._shapes(SIZES[size])}
    del made[GPT]
    assert {file: dict(sorted(shapes.items())) for file, shapes in made.items()} == wanted


@pytest.mark.parametrize("size", SIZES)
def test_the_transformer_is_a_llama_model(size: str) -> None:
    with torch.device("meta"):
        model = LlamaModel(LlamaConfig.from_dict(checkpoint._config(SIZES[size].gpt)))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    del shapes["embed_tokens.weight"]  # upstream has embeddings of its own
    assert shapes == checkpoint.gpt_shapes(SIZES[size].gpt)


def test_full_size_has_the_published_number_of_parameters() -> None:
    millions = {file: round(sum(map(math.prod, shapes.values())) / 1e6, 1) for file, shapes in checkpoint._shapes(FULL)}
    assert millions == {GPT: 188.8, EMBED: 36.4, DECODER: 25.9, VOCOS: 13.6, DVAE: 15.1}


def test_unmodified_upstream_speaks_with_it(upstream: Any) -> None:
    torch.manual_seed(1)
    params = import_chattts().Chat.InferCodeParams(
        spk_emb=upstream.sample_random_speaker(), min_new_token=8, max_new_token=64, show_tqdm=False
    )
    [audio] = upstream.infer(
        ["你好，世界。Hello [laugh] world"], skip_refine_text=True, split_text=False, params_infer_code=params
    )
    assert 8 * 512 - 256 - 100 < len(audio) <= 64 * 512
    assert np.isfinite(audio).all()
    assert 0.01 < audio.std() < 0.5
    assert np.abs(audio).max() < 1


def test_unmodified_upstream_refines_with_it(upstream: Any) -> None:
    params = import_chattts().Chat.RefineTextParams(prompt="[oral_2]", max_new_token=16, show_tqdm=False)
    [text] = upstream.infer(["你好"], refine_text_only=True, split_text=False, params_refine_text=params)
    assert text


def test_upstream_refuses_it_by_its_checksums_alone(tiny_checkpoint: Path) -> None:
    assert not import_chattts().Chat().load(source="custom", custom_path=str(tiny_checkpoint))


def test_the_same_seed_gives_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name, seed in {"same": 0, "other": 1}.items():
        make_checkpoint(tmp_path / name, SIZES["tiny"], seed)
    sums = file_sums(tiny_checkpoint, ALL_FILES)
    assert file_sums(tmp_path / "same", ALL_FILES) == sums
    others = file_sums(tmp_path / "other", ALL_FILES)
    assert {name for name in sums if sums[name] != others[name]} == {name for name in sums if "safetensors" in name}


def test_no_two_tensors_are_alike(tiny_checkpoint: Path) -> None:
    noise = [
        tensor.flatten()[:8].tolist()
        for file in (GPT, EMBED, DECODER, VOCOS)
        for name, tensor in load_file(tiny_checkpoint / file).items()
        if "window" not in name
    ]
    assert len({tuple(values) for values in noise}) == len(noise)


def test_windows_are_those_of_torch(tiny_checkpoint: Path) -> None:
    window = load_file(tiny_checkpoint / VOCOS)["head.istft.window"]
    assert torch.allclose(window, torch.hann_window(1024), atol=1e-7)


def test_sizes_are_read_back_from_the_files(tiny_checkpoint: Path) -> None:
    assert read_size(tiny_checkpoint) == SIZES["tiny"]


def test_runs_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service.engines.chattts.checkpoint", str(tmp_path), "--size", "tiny", "--stress"]
    subprocess.run(command, check=True, timeout=60)
    assert all((tmp_path / name).is_file() for name in ALL_FILES)
    assert load_file(tmp_path / DECODER)["decoder.decoder_block.0.dwconv.weight"].eq(0).any()


class TestTokenizer:
    """Upstream's own, on our files."""

    def test_tokens_have_the_numbers_they_have_in_the_published_one(self, upstream: Any) -> None:
        tokenizer = upstream.tokenizer
        assert (tokenizer.len, tokenizer.spk_emb_ids, tokenizer.break_0_ids, tokenizer.eos_token) == (
            *(21178, 21143),
            *(21147, 21136),
        )
        assert tokenizer._tokenizer.pad_token_id == 0

    @pytest.mark.parametrize("tag", checkpoint.SPECIAL_TOKENS)
    def test_tags_are_single_tokens_wherever_they_stand(self, upstream: Any, tag: str) -> None:
        assert upstream.tokenizer._tokenizer.tokenize(f"你{tag}好a{tag}b") == ["你", tag, "好", "a", tag, "b"]

    def test_texts_come_back(self, upstream: Any) -> None:
        ids, _, _ = upstream.tokenizer.encode(["你好，世界 hello [laugh] x"], 4)
        assert upstream.tokenizer.decode([ids[0, :, 0].tolist()]) == ["你 好 ， 世 界 hello [laugh] x"]

    def test_what_it_does_not_know_is_unknown(self, upstream: Any) -> None:
        assert upstream.tokenizer._tokenizer.tokenize("☃") == ["[UNK]"]


@pytest.fixture(scope="module")
def decode(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Hidden states → samples, by upstream's Decoder and Vocos with stress weights, in fp64."""
    folder = tmp_path_factory.mktemp("stress")
    make_checkpoint(folder, SIZES["tiny"], stress=True)
    chat = load_upstream(folder)
    decoder, vocos = chat.decoder.double(), chat.vocos.double()

    def decode(hidden: Tensor) -> Tensor:
        with torch.inference_mode():
            samples: Tensor = vocos.decode(decoder(hidden.t()[None].clone()))[0]
            return samples

    return decode


class TestStress:
    """A context of 52 steps on each side is exact, and one step less is heard, by upstream's own Decoder and Vocos."""

    @pytest.mark.parametrize(("past", "future"), [(51, 60), (60, 51)])
    def test_one_step_less_is_heard(self, decode: Any, past: int, future: int) -> None:
        assert _error_of_window(decode, past, future) > -100

    @pytest.mark.parametrize(("past", "future"), [(52, 60), (60, 52)])
    def test_52_steps_are_exact(self, decode: Any, past: int, future: int) -> None:
        assert _error_of_window(decode, past, future) < -240


def _error_of_window(decode: Any, past: int, future: int) -> float:
    """Decodes 24 steps amid others with so many steps before and after; dB of the error against decoding all."""
    hidden = torch.randn(160, SIZES["tiny"].gpt.hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start, end = 64, 88
    whole = decode(hidden)[512 * start : 512 * end]
    window = decode(hidden[start - past : end + future])[512 * past : 512 * (past + end - start)]
    return 20 * math.log10(float((window - whole).norm() / whole.norm()) + 1e-30)


def _modules(config: Any) -> dict[str, Shapes]:
    """The state dictionaries of upstream's modules, as `Chat._load` builds them."""
    import_chattts()
    from ChatTTS.model import DVAE as Convolutions  # noqa: N811 (it is a class)
    from ChatTTS.model import Embed
    from vocos import Vocos
    from vocos.pretrained import instantiate_class

    parts = (config.vocos.feature_extractor, config.vocos.backbone, config.vocos.head)
    dvae, embed = config.dvae, config.embed
    modules = {
        EMBED: Embed(embed.hidden_size, embed.num_audio_tokens, embed.num_text_tokens, embed.num_vq),
        DECODER: Convolutions(decoder_config=asdict(config.decoder), dim=config.decoder.idim),
        VOCOS: Vocos(*(instantiate_class(args=(), init=asdict(part)) for part in parts)),
        DVAE: Convolutions(asdict(dvae.decoder), asdict(dvae.encoder), asdict(dvae.vq), dvae.decoder.idim),
    }
    return {
        file: {name: tuple(tensor.shape) for name, tensor in sorted(module.state_dict().items())}
        for file, module in modules.items()
    }
