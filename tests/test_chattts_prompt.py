"""Prompts and voices: token for token and bit for bit those of unmodified upstream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher.engine import Controls, Segment
from common.errors import StartupError
from service.engines.chattts.load import load_weights
from service.engines.chattts.prompt import Prompter, read_text, refine_tags, speed_tag
from service.engines.chattts.upstream import import_chattts
from service.engines.chattts.voices import Voice, decode_speaker, draw_speaker, read_voices, speaker_vectors
from service.text.tags import TAG
from service.voices import VOICES

TEXTS = {
    "Chinese": ("你好，世界。今天天气不错！", "zh-CN"),
    "English": ("Hello, world. How are you?", "en-US"),
    "mixed": ("我们用 ChatTTS 说话，it works.", "zh-CN"),
    "English with Chinese": ("The word 你好 means hello.", "en-US"),
    "Cantonese": ("你哋好,我係香港人", "yue"),
    "tags": ("好笑[laugh]，停一下[uv_break]再说[lbreak]", "zh-CN"),
    "tags in English": ("so funny [laugh] wait [uv_break] go on", "en-US"),
    "tags at the ends": ("[laugh]哈哈[laugh]", "zh-CN"),
    "only a tag": ("[laugh]", "zh-CN"),
    "misread characters": ("於是粡髞與満", "zh-CN"),
    "misread in English": ("the character 於 is read", "en-US"),
    "marks": ("（一）：二；《三》【四】『五』「六」－七！", "zh-CN"),
    "half-width marks": ("a:b;c!(d)<e>-f", "en-US"),
    "half-width marks in Chinese": ("好:吗;是!(对)-啊,嗯.", "zh-CN"),
    "what the model cannot read": ("30% of 5 & 7 @ “home” … ☃ é", "en-US"),
    "what the model cannot read, in Chinese": ("百分之３０？“好”…☃é〇~", "zh-CN"),
    "spaces": ("  你好  ", "zh-CN"),
}
WRITTEN = st.text(st.sampled_from("你好於髞，。、！？：；（）《》,.!?:;()<>-—'\"12aZ é☃"), max_size=12)
TAGS = st.sampled_from(["[laugh]", "[uv_break]", "[lbreak]", "[v_break]", "[break_4]", "[laugh_0]", "[oral_9]"])
ANY_TEXT = st.lists(st.one_of(WRITTEN, TAGS), max_size=5).map("".join).filter(bool)


def segment(text: str, language: str = "zh-CN", **controls: Any) -> Segment:
    return Segment(text, "female1", language, controls=Controls(**controls))


@pytest.fixture(scope="module")
def prompter(tiny_checkpoint: Path) -> Prompter:
    return Prompter(load_weights(tiny_checkpoint, "cpu", "fp32", check_sums=False).tokenizer)


def upstream_text(upstream: Any, text: str, language: str) -> str:
    """What upstream's normaliser makes of a text in a language."""
    normalised: str = upstream.normalizer(text, lang="en" if language.startswith("en") else "zh")
    return normalised


def upstream_ids(upstream: Any, decorated: list[str]) -> list[int]:
    """A prompt's tokens. Upstream repeats them for each codebook."""
    ids, mask, _ = upstream.tokenizer.encode(decorated, 4)
    assert mask.all()
    assert (ids == ids[:, :, :1]).all()
    tokens: list[int] = ids[0, :, 0].tolist()
    return tokens


@pytest.mark.parametrize(("text", "language"), TEXTS.values(), ids=list(TEXTS))
class TestEqualToUpstream:
    def test_text(self, upstream: Any, text: str, language: str) -> None:
        assert read_text(segment(text, language)) == upstream_text(upstream, text, language)

    def test_code(self, upstream: Any, prompter: Prompter, text: str, language: str) -> None:
        theirs = [upstream_text(upstream, text, language)]
        theirs = upstream.speaker.decorate_code_prompts(theirs, "[speed_5]", None, "a speaker")
        prompt = prompter.code(segment(text, language))
        assert prompt.ids == upstream_ids(upstream, theirs)
        places = [place for place, number in enumerate(prompt.ids) if number == upstream.tokenizer.spk_emb_ids]
        assert places == [prompt.speaker]

    def test_code_without_a_speaker(self, upstream: Any, prompter: Prompter, text: str, language: str) -> None:
        theirs = [upstream_text(upstream, text, language)]
        theirs = upstream.speaker.decorate_code_prompts(theirs, "[speed_5]", None, None)
        prompt = prompter.code(segment(text, language), speaker=False)
        assert prompt.ids == upstream_ids(upstream, theirs)
        assert prompt.speaker is None

    def test_refine(self, upstream: Any, prompter: Prompter, text: str, language: str) -> None:
        theirs = [upstream_text(upstream, text, language)]
        theirs = upstream.speaker.decorate_text_prompts(theirs, "[oral_2][laugh_0][break_6]")
        prompt = prompter.refine(segment(text, language, oral=2, laugh=0, pause=6))
        assert prompt.ids == upstream_ids(upstream, theirs)
        assert prompt.speaker is None


@settings(max_examples=50, deadline=None)
@given(text=ANY_TEXT, language=st.sampled_from(["zh-CN", "en-US"]))
def test_any_text_is_read_as_upstream_reads_it(upstream: Any, prompter: Prompter, text: str, language: str) -> None:
    theirs = [upstream_text(upstream, text, language)]
    theirs = upstream.speaker.decorate_code_prompts(theirs, "[speed_5]", None, "a speaker")
    assert prompter.code(segment(text, language)).ids == upstream_ids(upstream, theirs)


class TestRefined:
    """The model's answer to a refine prompt, and the code prompt made of it."""

    ANSWER = "你好[uv_break]世界[laugh]hello"

    def test_reads_as_upstream_reads_it(self, upstream: Any, prompter: Prompter) -> None:
        ids = torch.tensor(prompter._encode(f"{self.ANSWER}[break_0][oral_3][speed_9]"))
        [theirs] = upstream.tokenizer.decode([ids[ids.less(upstream.tokenizer.break_0_ids)]])
        assert prompter.refined(ids.tolist()) == theirs == "你 好 [uv_break] 世 界 [laugh] hello"

    def test_ends_where_upstream_ends(self, upstream: Any, prompter: Prompter) -> None:
        assert prompter.refine_end == upstream.tokenizer.eos_token

    def test_is_spoken_in_place_of_the_text(self, upstream: Any, prompter: Prompter) -> None:
        refined = "於 是 [uv_break] 好 !"  # upstream does not normalise it again
        theirs = upstream.speaker.decorate_code_prompts([refined], "[speed_5]", None, "a speaker")
        assert prompter.code(segment("你好"), refined).ids == upstream_ids(upstream, theirs)

    def test_marks_of_prompts_in_it_are_dropped_as_upstream_does(self, upstream: Any, prompter: Prompter) -> None:
        refined = "[Stts][spk_emb] 你好 [empty_spk]"
        theirs = upstream.speaker.decorate_code_prompts([refined], "[speed_5]", None, "a speaker")
        prompt = prompter.code(segment("你好"), refined)
        assert prompt.ids == upstream_ids(upstream, theirs)
        assert prompt.speaker == 1


class TestControls:
    @pytest.mark.parametrize(
        ("speed", "tag"),
        [
            (0.5, 1),
            (0.6, 2),
            (0.7, 3),
            (0.84, 4),
            (0.95, 5),
            (1.0, 5),
            (1.05, 5),
            (1.2, 6),
            (1.5, 7),
            (1.68, 8),
            (2.0, 9),
        ],
    )
    def test_speed(self, speed: float, tag: int) -> None:
        assert speed_tag(speed) == f"[speed_{tag}]"

    def test_faster_is_never_a_slower_tag(self) -> None:
        tags = [speed_tag(0.5 + n / 100) for n in range(151)]
        assert tags == sorted(tags)
        assert len(set(tags)) == 9

    def test_speed_is_in_the_prompt(self, upstream: Any, prompter: Prompter) -> None:
        theirs = upstream.speaker.decorate_code_prompts(["你好"], "[speed_9]", None, "a speaker")
        assert prompter.code(segment("你好", speed=2.0)).ids == upstream_ids(upstream, theirs)

    @pytest.mark.parametrize(
        ("controls", "tags"),
        [
            (Controls(), ""),
            (Controls(oral=0, laugh=0, pause=0), "[oral_0][laugh_0][break_0]"),
            (Controls(oral=9, laugh=2, pause=7), "[oral_9][laugh_2][break_7]"),
            (Controls(laugh=1), "[laugh_1]"),
        ],
    )
    def test_refine_tags(self, controls: Controls, tags: str) -> None:
        assert refine_tags(controls) == tags

    def test_every_tag_that_controls_can_give_is_one_token(self, prompter: Prompter) -> None:
        tags = [speed_tag(speed / 10) for speed in range(5, 21)]
        tags += [refine_tags(Controls(oral=oral)) for oral in range(10)]
        tags += [refine_tags(Controls(laugh=laugh)) for laugh in range(3)]
        tags += [refine_tags(Controls(pause=pause)) for pause in range(8)]
        assert all(len(prompter._encode(tag)) == 1 for tag in tags)
        assert all(TAG.fullmatch(tag) for tag in tags)


@pytest.fixture(scope="module")
def published() -> Any:
    """Upstream's speakers for the published width."""
    return import_chattts().model.Speaker(768, import_chattts().Chat().config.spk_stat)


class TestSpeakers:
    """Speaker vectors, bit for bit."""

    @pytest.mark.parametrize("seed", [0, 1, 2, 2222, 2**63])
    def test_drawn_by_seed(self, published: Any, seed: int) -> None:
        torch.manual_seed(seed)
        assert torch.equal(draw_speaker(seed, published.std, published.mean), published._sample_random())

    def test_drawing_leaves_other_random_numbers_alone(self, published: Any) -> None:
        before = torch.get_rng_state()
        draw_speaker(1, published.std, published.mean)
        assert torch.equal(torch.get_rng_state(), before)

    def test_read_as_upstream_writes_them(self, published: Any) -> None:
        vector = published._sample_random()
        assert torch.equal(decode_speaker(published._encode(vector)), vector)

    @pytest.mark.parametrize("written", [True, False])
    def test_applied_as_upstream_applies_them(self, published: Any, written: bool) -> None:
        speaker = published._encode(draw_speaker(7, published.std, published.mean))
        theirs = published.apply(
            *(torch.zeros(1, 3, 768), speaker, torch.tensor([[[1] * 4, [9] * 4, [2] * 4]]), 9, torch.device("cpu"))
        )
        voice = Voice(description="", speaker=speaker) if written else Voice(description="", seed=7)
        ours = speaker_vectors({"it": voice}, published.std, published.mean)["it"]
        assert ours.dtype is torch.float32
        assert torch.equal(ours, theirs[0, 1])
        assert float(ours.norm()) == pytest.approx(1, abs=1e-3)

    @pytest.mark.parametrize(
        ("speaker", "message"),
        [
            ("hello", "voice it: its speaker is not written as ChatTTS writes them"),
            ("", "voice it: its speaker"),
            ("蘁淰敥歊養", "voice it: its speaker is not written as ChatTTS writes them"),
        ],
    )
    def test_written_otherwise(self, published: Any, speaker: str, message: str) -> None:
        with pytest.raises(StartupError, match=message):
            speaker_vectors({"it": Voice(description="", speaker=speaker)}, published.std, published.mean)

    @pytest.mark.parametrize(
        ("vector", "message"),
        [
            (torch.ones(192), "its speaker has 192 numbers, but these weights take 768"),
            (torch.full((768,), float("nan")), "not finite"),
        ],
    )
    def test_of_another_model(self, published: Any, vector: torch.Tensor, message: str) -> None:
        voice = Voice(description="", speaker=published._encode(vector))
        with pytest.raises(StartupError, match=message):
            speaker_vectors({"it": voice}, published.std, published.mean)


class TestVoices:
    """`voices.toml`."""

    def test_built_in_voices_are_the_services(self) -> None:
        assert {name: voice.description for name, voice in read_voices().items()} == VOICES

    def test_built_in_voices_differ(self, upstream: Any) -> None:
        vectors = speaker_vectors(read_voices(), upstream.speaker.std, upstream.speaker.mean)
        assert len({tuple(vector.tolist()) for vector in vectors.values()}) == len(VOICES)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[a", "cannot be read as TOML"),
            ("a = 1", "a: "),
            ("[a]\nseed = 1", "a.description: Field required"),
            ("[a]\ndescription = ''", "a: Value error, must have either a seed or a speaker"),
            ("[a]\ndescription = ''\nseed = 1\nspeaker = ''", "a: Value error, must have either a seed or a speaker"),
            ("[a]\ndescription = ''\nseed = -1", "a.seed: "),
            ("[a]\ndescription = ''\nseed = 1\npitch = 2", "a.pitch: Extra inputs are not permitted"),
            (None, "cannot be read: No such file"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path: Path, content: str | None, message: str) -> None:
        path = tmp_path / "voices.toml"
        if content is not None:
            path.write_text(content)
        with pytest.raises(StartupError) as caught:
            read_voices(path)
        assert message in str(caught.value)
        assert str(path) in str(caught.value)
