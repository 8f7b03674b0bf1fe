"""Weights from disk: equal to what upstream computes with, and a clear word for everything that can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import StartupError
from common.settings import ChatTTSSettings
from service.engines.chattts import check, hub, package
from service.engines.chattts.check import file_sums
from service.engines.chattts.checkpoint import CONFIG, DECODER, EMBED, FILES, GPT, TOKENIZER, VOCOS
from service.engines.chattts.load import Weights, choose_device, choose_dtype, load_weights
from service.engines.chattts.upstream import import_chattts

TOKENS = f"{TOKENIZER}/tokenizer.json"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of one test alone."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "weights")


def load(folder: Path) -> Weights:
    return load_weights(folder, "cpu", "fp32", check_sums=False)


class TestEqualToUpstream:
    def test_heads_have_their_weight_norm_folded(self, tiny_checkpoint: Path, upstream: Any) -> None:
        weights = load(tiny_checkpoint)
        assert torch.equal(weights.head_text, upstream.embed.head_text.weight)
        assert torch.equal(weights.head_audio, torch.stack([head.weight for head in upstream.embed.head_code]))

    def test_embeddings(self, tiny_checkpoint: Path, upstream: Any) -> None:
        weights = load(tiny_checkpoint)
        assert torch.equal(weights.embed_text, upstream.embed.emb_text.weight)
        assert torch.equal(weights.embed_audio, torch.stack([table.weight for table in upstream.embed.emb_code]))

    @pytest.mark.parametrize("part", ["gpt", "decoder", "vocos"])
    def test_tensors_by_name(self, tiny_checkpoint: Path, upstream: Any, part: str) -> None:
        theirs = (upstream.gpt.gpt if part == "gpt" else getattr(upstream, part)).state_dict()
        ours = getattr(load(tiny_checkpoint), part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def test_speaker_statistics(self, tiny_checkpoint: Path, upstream: Any) -> None:
        weights = load(tiny_checkpoint)
        assert torch.equal(weights.speaker_std, upstream.speaker.std)
        assert torch.equal(weights.speaker_mean, upstream.speaker.mean)

    def test_published_speaker_statistics(self) -> None:
        chat = import_chattts().Chat()
        speaker = import_chattts().model.Speaker(768, chat.config.spk_stat)
        std, mean = package.speaker_statistics(768)
        assert torch.equal(torch.from_numpy(std), speaker.std)
        assert torch.equal(torch.from_numpy(mean), speaker.mean)
        assert package.published_sums() == chat.sha256_map


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_the_transformer_takes_the_dtype_and_the_vocoder_stays_fp32(
    tiny_checkpoint: Path, name: Any, dtype: torch.dtype
) -> None:
    weights = load_weights(tiny_checkpoint, "cpu", name, check_sums=False)
    transformer = [
        *weights.gpt.values(),
        weights.embed_audio,
        weights.embed_text,
        weights.head_audio,
        weights.head_text,
    ]
    assert {tensor.dtype for tensor in transformer} == {weights.dtype} == {dtype}
    assert {tensor.dtype for tensor in (*weights.decoder.values(), *weights.vocos.values())} == {torch.float32}


def test_nothing_stays_mapped(folder: Path) -> None:
    """A file that is written over under a running service changes nothing that was loaded from it."""
    weights = load(folder)
    tensors = [weights.embed_audio, weights.embed_text, weights.head_audio, weights.head_text]
    tensors += [*weights.gpt.values(), *weights.decoder.values(), *weights.vocos.values()]
    before = [tensor.clone() for tensor in tensors]
    for name in (GPT, EMBED, DECODER, VOCOS):
        with (folder / name).open("r+b") as file:
            file.write(bytes((folder / name).stat().st_size))
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("name", FILES)
def test_the_revision_changes_with_every_file(folder: Path, name: str) -> None:
    before = load(folder).revision
    assert load(folder).revision == before
    if name.endswith("json"):
        (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
    else:
        tensors = load_file(folder / name)
        first = next(iter(tensors))
        save_file(tensors | {first: tensors[first] + 1}, folder / name, metadata={"format": "pt"})
    assert load(folder).revision != before


def test_serving_imports_nothing_of_upstreams_code(tiny_checkpoint: Path) -> None:
    """Not ChatTTS, nor what it drags in: torchaudio does not even import beside a CPU torch."""
    code = (
        "import sys; from pathlib import Path; from service.engines.chattts import hub, load, prompt, voices\n"
        f"weights = load.load_weights(Path({str(tiny_checkpoint)!r}), 'cpu', 'fp32', check_sums=False)\n"
        "prompt.Prompter(weights.tokenizer); prompt.homophones(); voices.read_voices()\n"
        "print({'ChatTTS', 'torchaudio', 'numba', 'vocos'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_the_stand_in_for_torchaudio_gives_way_to_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchaudio._extension", raising=False)
    for name in ("torchaudio", "ChatTTS"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    import_chattts()
    assert "torchaudio._extension" not in sys.modules


class TestChoice:
    """Of device and dtype."""

    @pytest.mark.parametrize(("gpu", "device"), [(True, "cuda"), (False, "cpu")])
    def test_a_gpu_is_used_where_there_is_one(self, monkeypatch: pytest.MonkeyPatch, gpu: bool, device: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        assert choose_device("auto").type == device
        assert choose_device("cpu").type == "cpu"

    def test_a_gpu_that_is_not_there_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(StartupError, match=r"chattts\.device is cuda, but torch .* sees no GPU"):
            choose_device("cuda")

    @pytest.mark.parametrize(
        ("device", "features", "dtype"),
        [
            ("cuda", {}, torch.bfloat16),
            ("cpu", {"avx512_bf16": True}, torch.bfloat16),
            ("cpu", {"amx_bf16": True}, torch.bfloat16),
            ("cpu", {"avx2": True, "avx512_f": True, "avx512_bf16": False}, torch.float32),
            ("cpu", {}, torch.float32),
        ],
    )
    def test_bf16_where_the_hardware_has_it(
        self, monkeypatch: pytest.MonkeyPatch, device: str, features: dict[str, bool], dtype: torch.dtype
    ) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
        assert choose_dtype("auto", torch.device(device)) is dtype
        assert choose_dtype("fp16", torch.device(device)) is torch.float16

    @pytest.mark.parametrize(("device", "there"), [("cuda", True), ("cpu", False)])
    def test_int8_where_it_cannot_be_had_is_an_error(
        self, monkeypatch: pytest.MonkeyPatch, device: str, there: bool
    ) -> None:
        monkeypatch.setattr("service.engines.chattts.load.has_int8", lambda: there)
        with pytest.raises(StartupError, match=r"chattts\.dtype is int8, which is for x86 CPUs"):
            choose_dtype("int8", torch.device(device))


# What may be wrong with a folder: how to make it so → what the message says.


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def _cut(name: str, kept: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * kept)])

    return damage


def _with_config(**fields: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text()) | fields
        (folder / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if value != "gone"}))

    return damage


def _with_tensor(file: str, name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    """`change` gives the new tensor, or None to leave it out."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        changed = change(tensors.pop(name, torch.zeros(1)))
        if changed is not None:
            tensors[name] = changed
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return damage


def _move_up(folder: Path) -> None:
    """The files lie in the folder itself, as in the folder `asset` of the hub."""
    for path in (folder / "asset").iterdir():
        path.rename(folder / path.name)


def _old_release(folder: Path) -> None:
    shutil.rmtree(folder / "asset")
    (folder / "asset").mkdir()
    (folder / "asset" / "GPT.pt").write_bytes(b"\x80\x04.")


def _directory(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def _forget_piece(folder: Path) -> None:
    tokenizer = json.loads((folder / TOKENS).read_text())
    del tokenizer["model"]["vocab"]["##qx"]
    (folder / TOKENS).write_text(json.dumps(tokenizer))


def _rename_tag(folder: Path) -> None:
    for path in (folder / TOKENIZER).iterdir():
        path.write_text(path.read_text().replace("[Ptts]", "[Pttx]"))


Q = "layers.0.self_attn.q_proj.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:cd08\nsize 755\n"

DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (shutil.rmtree, "is no folder"),
    "an empty folder": (
        lambda folder: shutil.rmtree(folder / "asset"),
        "has no ChatTTS weights: it should have asset/",
    ),
    "the folder below": (_move_up, "should be the folder asset in it; move its files into a folder asset"),
    "files from before 0.2": (_old_release, "has .pt files, from before ChatTTS 0.2: they may run code"),
    **{f"no {name}": (_remove(name), f"lacks {name}; fetch") for name in FILES},
    "two missing": (lambda folder: (_remove(GPT)(folder), _remove(VOCOS)(folder))[0], f"lacks {GPT}, {VOCOS}; fetch"),
    "a folder for a file": (_directory(GPT), f"lacks {GPT}"),
    **{f"empty {name}": (_write(name, b""), f"{name} is not a whole") for name in (GPT, EMBED, DECODER, VOCOS)},
    **{f"half {name}": (_cut(name, 0.5), f"{name} is not a whole") for name in (GPT, EMBED, DECODER, VOCOS)},
    "a byte short": (_cut(GPT, 0.999999), f"{GPT} is not a whole"),
    "a cut header": (_write(GPT, b"\x08\0\0"), f"{GPT} is not a whole"),
    "a pickle": (_write(GPT, b"\x80\x04" + bytes(1000)), f"{GPT} is not a whole"),
    "a pointer": (_write(GPT, POINTER), f"{GPT} is only Git LFS's pointer to the file; run `git lfs pull`"),
    "a web page": (_write(GPT, b"<html>404</html>"), f"{GPT} is not a whole"),
    "a tensor missing": (_with_tensor(GPT, Q, lambda _: None), f"{Q} is missing"),
    "a tensor too many": (_with_tensor(GPT, "surplus", lambda old: old), "surplus does not belong there"),
    "a wrong shape": (_with_tensor(GPT, Q, lambda old: old[:-1].clone()), f"{Q} is [47, 48] and should be [48, 48]"),
    "a flat tensor": (_with_tensor(GPT, Q, lambda old: old.flatten()), f"{Q} is [2304] and should be [48, 48]"),
    "whole numbers": (
        _with_tensor(GPT, Q, lambda old: old.to(torch.int8)),
        f"{Q} is I8 and should be one of BF16, F16",
    ),
    "fp64": (_with_tensor(VOCOS, "head.out.bias", lambda old: old.double()), "head.out.bias is F64 and should be"),
    "no text embedding": (_with_tensor(EMBED, "emb_text.weight", lambda _: None), "lack 'emb_text.weight'"),
    "no audio embedding": (_with_tensor(EMBED, "emb_code.0.weight", lambda _: None), "lack 'emb_code.0.weight'"),
    "a codebook less": (_with_tensor(EMBED, "emb_code.3.weight", lambda _: None), "does not belong there"),
    "a scalar for a table": (
        _with_tensor(EMBED, "emb_text.weight", lambda _: torch.tensor(1.0)),
        "sizes that are none",
    ),
    "no decoder input": (_with_tensor(DECODER, "decoder.conv_in.0.weight", lambda _: None), "lacks a tensor"),
    "a flat decoder": (
        _with_tensor(DECODER, "decoder.conv_out.weight", lambda old: old.flatten()),
        "or one has a wrong shape",
    ),
    "no vocoder blocks": (_with_tensor(VOCOS, "backbone.convnext.0.pwconv1.weight", lambda _: None), "lacks a tensor"),
    "a block less": (_with_tensor(VOCOS, "backbone.convnext.7.gamma", lambda _: None), "and 5 more"),
    "another decoder": (
        lambda folder: save_file(_other_decoder(folder), folder / DECODER),
        "takes frames of 12 numbers, but hidden states",
    ),
    "no JSON": (_write(CONFIG, b"{"), f"{CONFIG} cannot be read"),
    "not UTF-8": (_write(CONFIG, b"\xff{}"), f"{CONFIG} cannot be read"),
    "a JSON list": (_write(CONFIG, b"[]"), f"{CONFIG} is not the configuration of a model"),
    "another model": (
        _with_config(model_type="gpt2"),
        "has model_type = 'gpt2', and this engine computes only 'llama'",
    ),
    "another activation": (_with_config(hidden_act="gelu"), "has hidden_act = 'gelu'"),
    "grouped heads": (_with_config(num_key_value_heads=1), "has num_key_value_heads = 1"),
    "scaled positions": (_with_config(rope_scaling={"type": "linear"}), "has rope_scaling ="),
    "biases": (_with_config(attention_bias=True), "has attention_bias = True"),
    "no hidden size": (_with_config(hidden_size="gone"), "lack 'hidden_size'"),
    "no number": (_with_config(hidden_size="48"), "has sizes that are none"),
    "a fraction": (_with_config(num_hidden_layers=3.5), "has sizes that are none"),
    "no heads": (_with_config(num_attention_heads=0, num_key_value_heads=0), "has sizes that are none"),
    "another width": (_with_config(hidden_size=64), "emb_code.0.weight is [626, 48] and should be [626, 64]"),
    "more layers": (_with_config(num_hidden_layers=4), "layers.3.self_attn.q_proj.weight is missing"),
    "less layers": (_with_config(num_hidden_layers=2), "layers.2."),
    "no tokenizer": (_write(TOKENS, b"{}"), "has no tokenizer that can be read"),
    "half a tokenizer": (_cut(TOKENS, 0.5), "has no tokenizer that can be read"),
    "a token less": (_forget_piece, "has 21177 tokens, but the weights 21178"),
    "a token by another name": (_rename_tag, "does not know [Ptts] as single tokens"),
}


def _other_decoder(folder: Path) -> dict[str, Tensor]:
    """The decoder of a narrower checkpoint."""
    tensors = load_file(folder / DECODER)
    tensors["decoder.conv_in.0.weight"] = tensors["decoder.conv_in.0.weight"][:, :12].clone()
    tensors["out_conv.weight"] = tensors["out_conv.weight"][:, :12].clone()
    tensors["decoder.conv_out.weight"] = tensors["decoder.conv_out.weight"][:12].clone()
    return tensors


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=list(DAMAGE))
def test_what_is_wrong_with_the_files_is_said(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(StartupError) as caught:
        load(folder)
    said = str(caught.value)
    assert message in said
    assert str(folder.parent) in said
    assert len(said) < 1200


def test_the_folder_below_is_told_from_the_right_one(folder: Path) -> None:
    with pytest.raises(StartupError) as caught:
        load(folder / "asset")
    assert str(caught.value).endswith(f"; name {folder}")


class TestSums:
    """Checksums: only the published weights, unless the settings say otherwise."""

    def test_random_weights_are_refused_and_named(self, folder: Path) -> None:
        with pytest.raises(StartupError, match="damaged or not the published ones") as caught:
            load_weights(folder, "cpu", "fp32")
        assert all(name in str(caught.value) for name in FILES)
        assert "chattts.check_sums=false" in str(caught.value)

    def test_the_published_are_taken(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sums = file_sums(folder)
        assert sums.keys() <= package.published_sums().keys()
        monkeypatch.setattr(check, "published_sums", lambda: sums)
        load_weights(folder, "cpu", "fp32")

    def test_one_bit_is_found(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sums = file_sums(folder)
        monkeypatch.setattr(check, "published_sums", lambda: sums)
        content = bytearray((folder / DECODER).read_bytes())
        content[-1] ^= 1
        (folder / DECODER).write_bytes(content)
        with pytest.raises(StartupError, match=f"by their checksums: {DECODER};"):
            load_weights(folder, "cpu", "fp32")


class TestPackage:
    """The ChatTTS package, from which data are read."""

    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(package, "find_spec", lambda _: None)
        with pytest.raises(StartupError, match="the ChatTTS package is not installed; install 0"):
            package.published_sums()

    @pytest.mark.parametrize("content", [None, "{", "class Config: spk_stat = ''", "class Config: pass"])
    def test_another_version(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None) -> None:
        if content is not None:
            (tmp_path / "res").mkdir()
            (tmp_path / "res" / "sha256_map.json").write_text(content)
            (tmp_path / "config").mkdir()
            (tmp_path / "config" / "config.py").write_text(content if "class" in content else "")
        monkeypatch.setattr(package, "_package", lambda: tmp_path)
        with pytest.raises(StartupError, match="has no sha256_map"):
            package.published_sums()
        with pytest.raises(StartupError, match="speaker"):
            package.speaker_statistics(48)

    def test_a_model_wider_than_its_speakers(self) -> None:
        with pytest.raises(StartupError, match="by 768 numbers, these weights by 1024"):
            package.speaker_statistics(1024)


class Hub(ThreadingHTTPServer):
    """As much of huggingface.co as a download needs, with one repository."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.folder = folder
        self.sent: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _HubHandler(BaseHTTPRequestHandler):
    server: Hub
    commit = "c0ffee" * 6 + "c0ff"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/2Noise/ChatTTS"):
            files = [str(p.relative_to(self.server.folder)) for p in self.server.folder.rglob("*") if p.is_file()]
            body = {"id": "2Noise/ChatTTS", "sha": self.commit, "siblings": [{"rfilename": name} for name in files]}
            return self._send(json.dumps(body).encode(), "application/json")
        name = path.split("/", 5)[-1]
        if not (self.server.folder / name).is_file():
            return self.send_error(404)
        if self.command == "GET":
            self.server.sent.append(name)
        return self._send((self.server.folder / name).read_bytes(), "application/octet-stream")

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "ETag": f'"{hash(body) & (1 << 64) - 1:x}"'}
        for header, value in (headers | {"X-Repo-Commit": self.commit}).items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def mirror(tiny_checkpoint: Path) -> Iterator[Hub]:
    with Hub(tiny_checkpoint) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(cache: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    """Fetches in a process of its own, since the hub's client reads its environment when it is imported."""
    code = (
        "import sys; from pathlib import Path; from common.errors import StartupError\n"
        "from service.engines.chattts.hub import fetch\n"
        "try: print(fetch(Path(sys.argv[1])))\n"
        "except StartupError as error: sys.exit(str(error))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, str(cache)], env=environment, capture_output=True, text=True, timeout=60
    )


class TestHub:
    def test_a_network_that_is_not_there_is_said_with_what_to_do(self, tmp_path: Path) -> None:
        done = fetch(tmp_path, "http://127.0.0.1:1")
        assert done.returncode == 1
        assert "the weights of 2Noise/ChatTTS cannot be fetched" in done.stderr
        assert "Connection refused" in done.stderr
        assert "hf download 2Noise/ChatTTS --include 'asset/*' --local-dir chattts" in done.stderr
        assert "CHORUS_CHATTTS_FOLDER=chattts" in done.stderr
        assert "Traceback" not in done.stderr

    def test_weights_are_fetched_once(self, tmp_path: Path, mirror: Hub) -> None:
        first = fetch(tmp_path, mirror.url)
        assert first.returncode == 0, first.stderr
        assert sorted(mirror.sent) == sorted(FILES)
        assert "100%" in first.stderr
        load(Path(first.stdout.strip()))
        second = fetch(tmp_path, "http://127.0.0.1:1")
        assert second.stdout == first.stdout

    def test_what_is_missing_is_fetched(self, tmp_path: Path, mirror: Hub) -> None:
        folder = Path(fetch(tmp_path, mirror.url).stdout.strip())
        (folder / GPT).resolve().unlink()
        (folder / GPT).unlink()
        mirror.sent.clear()
        assert fetch(tmp_path, mirror.url).returncode == 0
        assert mirror.sent == [GPT]

    def test_a_part_is_not_enough(self, tmp_path: Path, mirror: Hub) -> None:
        folder = Path(fetch(tmp_path, mirror.url).stdout.strip())
        (folder / GPT).unlink()
        done = fetch(tmp_path, "http://127.0.0.1:1")
        assert "are here only in part, and the rest cannot be fetched" in done.stderr
        assert "CHORUS_CHATTTS_FOLDER" in done.stderr

    def test_a_folder_of_the_settings_needs_no_network(self, tmp_path: Path) -> None:
        assert hub.find_checkpoint(ChatTTSSettings(folder=tmp_path)) == tmp_path
