import itertools
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.text import (
    FRONT_END_REVISION,
    Rejected,
    Segmenter,
    TextSegment,
    detect_language,
    has_speech,
    normalize,
    pauses,
    segments,
    split,
    strip_tags,
    warm_up,
)
from service.text.clean import show, weight
from service.text.normalizer import speak
from tests import fuzz_text

ARTICLE = (Path(__file__).parent / "data" / "article.txt").read_text()

# Characters that meet in bad places, and texts of nothing else.
NASTY = (
    "a1Z好哋가٣½_ﬁだक्ष。，,.:;!?…—\"'“”（( \n\t\0\r\x85"
    "\u200b\u200d\u0301\ufe0f\u1161\u115f\u3164\u3099😀🇨\U0001f3fb\U000e0067"
)
WORDS = [
    "Dr.",
    "e.g.",
    "3.14",
    "https://a.io/b?c=1,2",
    "好。",
    "他说：",
    " ",
    "\n",
    "word",
    "-" * 20,
    "\u0301" * 20,
    "（",
    "¥3,500.50",
    "v1.2.3",
    "10~20%",
    "4C8G",
    "2024-01-05",
    "½",
    "Ⅳ",
    "[laugh]",
    "[Stts]",
    "me@a.io",
    "1e9",
    "m²",
    "😀",
    "“",
    "”",
]
LETTERS = "abé가好佢ไทย \n\u0301，。,;!?“”()"
any_text = st.one_of(
    st.text(max_size=400),
    st.text(NASTY, max_size=400),
    st.lists(st.sampled_from(WORDS), max_size=150).map("".join),
)
speakable = any_text.filter(has_speech)
firsts = st.integers(1, 130)
maxima = st.integers(40, 130)


@pytest.fixture(autouse=True, scope="module")
def warm() -> None:
    warm_up()


def spoken(text: str, first: int = 40, limit: int = 110) -> list[str]:
    return [part.spoken_text for part in split(text, first_characters=first, max_characters=limit)]


def spans(text: str, first: int = 40, limit: int = 110) -> list[str]:
    data = text.encode()
    parts = list(split(text, first_characters=first, max_characters=limit))
    return [data[part.start_byte : part.end_byte].decode() for part in parts]


def letters(text: str) -> str:
    """Letters, taken apart: what a mark is composed with may change, letters may not."""
    return "".join(filter(str.isalpha, unicodedata.normalize("NFD", text)))


def fed(text: str, cuts: list[int], first: int = 40, limit: int = 110) -> list[TextSegment]:
    """The segments of a text that comes in pieces, cut at these places."""
    segmenter = Segmenter(first_characters=first, max_characters=limit)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    parts = [part for start, end in itertools.pairwise(places) for part in segmenter.feed(text[start:end])]
    return parts + segmenter.flush(end=True)


def pieces(text: str) -> list[str]:
    """Where a text would be split at pauses if segments were as short as they can be."""
    ends = [at for at, level in enumerate(pauses.find_pauses(show(text))) if level]
    return [text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)]) if start < end]


# --- Examples


def test_a_short_text_is_one_segment() -> None:
    assert list(split("你好，世界。")) == [TextSegment(0, 18, "你好，世界。", "zh-CN")]


def test_the_language_given_is_kept() -> None:
    assert [segment.language for segment in split("你好。" * 60, "yue")] == ["yue"] * 3


def test_the_revision_has_a_name() -> None:
    assert FRONT_END_REVISION == "text-2"


@pytest.mark.parametrize(
    "sentences",
    [
        "今天天气很好。|我们出去吧！|好吗？|好；|走……|到了",
        "Hello there. |How are you? |Fine! |Go; |Now",
        "今天很好.|明天也好.|第3.5节",
        "他说：|“好。”|然后走了。|（真的！）|【完】",
        '他说：|"好。"|然后走了。|"不行！"|你好。|"世界"很大。',
        'He said "No!" |and left. |"Yes." |So (it was.) |Fine',
        "我想，|他、|你：——|对",
        "One, |two: |three",
        "你好,|world,hello",
        "3.14 and 1,000 at 12:30 is 1２：３０ and ３．１４ and 10—20",
        "See https://a.com/b?c=1,2;d:e. |Or me@b.org, |ok",
        "访问https://a.com/b?c=1,|然后",
        "Dr. Smith of the U.S. Army met J. Doe, |e.g. No. 5. |No. |He left",
        "1. 第一。|2. 第二\n|3. 第三",
        "# 1. 去重\n|• 2. 好",
        "a\n\n\n|b\r\n|c\u2028|d",
        "x = a?b:c; |f(a,b); |y != 2",
        "Wait... |what? |Yes…|no",
        "प्रश्न है। |हाँ",
        "ما هذا؟ |نعم، |لا",
    ],
)
def test_where_a_speaker_pauses(sentences: str) -> None:
    assert pieces(sentences.replace("|", "")) == sentences.split("|")


# A language of which we do not know the numbers is only cleaned.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n\n b\t\tc\u3000d", "a b c d"),
        ("\ufeffa\u200bb\u00adc\0d\x07e", "abc d e"),
        ("e\u0301 e\u200d\u0301", "é é"),
        ("1\ufe0f\u20e3 👨\u200d👩\u200d👧 ❤️ a", "1 a"),
        ("a\u3164b \u115f", "ab"),
        ("a " + "=" * 99 + " b", "a " + "=" * 14 + " b"),
        ("a" + "\u0301" * 99, "á" + "\u0301" * 15),
        ("ﬁ ½ Ⅳ ①", "ﬁ ½ Ⅳ ①"),
    ],
)
def test_what_is_shown(text: str, expected: str) -> None:
    assert [part.spoken_text for part in split(text, "fr-FR")] == [expected]


@pytest.mark.parametrize("text", ["", " \n", "。。。", "...", "😀👍🏽", "\0", "\u0301", "\u3164\u115f", "_-_", "€%"])
def test_nothing_to_speak(text: str) -> None:
    assert not has_speech(text)
    with pytest.raises(ValueError, match="nothing to speak"):
        split(text)


@pytest.mark.parametrize("text", ["a", "1", "好", "٣", "½", "กำ", "(((가", "\u0301é", "ⅷ"])
def test_something_to_speak(text: str) -> None:
    assert has_speech(text)
    assert len(list(split(text))) == 1


def test_a_limit_too_small_for_any_text() -> None:
    with pytest.raises(ValueError, match="at least 40"):
        split("好", max_characters=39)


def test_the_first_segment_is_short() -> None:
    assert spoken("今天天气很好。" * 30)[0] == "今天天气很好。" * 2
    assert spoken("今天天气很好，" * 30)[0] == "今天天气很好，" * 3
    assert spoken("好。" + "今天天气很好，" * 30)[0] == "好。" + "今天天气很好，" * 3


def test_without_a_pause_near_the_first_segment_ends_at_the_next() -> None:
    assert spoken("好" * 60 + "，" + "好" * 90) == ["好" * 60 + "，", "好" * 90]


def test_neighbours_are_merged_up_to_the_limit() -> None:
    assert [weight(text) for text in spoken("今天天气很好。" * 60)] == [14, 105, 105, 105, 91]


def test_a_sentence_that_fits_is_not_split() -> None:
    long = "今天，" * 33 + "好。"
    assert spoken("你好，世界。" * 2 + long) == ["你好，世界。" * 2, long]


def test_a_long_sentence_is_split_at_clauses_then_spaces_then_characters() -> None:
    assert spoken("今天天气，" * 40, first=1)[1:] == ["今天天气，" * 22, "今天天气，" * 17]
    assert all(text.endswith("word") for text in spoken("word " * 200))
    assert [len(text) for text in spoken("好" * 250)] == [110, 110, 30]
    assert all(weight(text) <= 110 for text in spoken("a" * 5000))


def test_no_segment_is_a_word_or_two() -> None:
    assert [len(text) for text in spoken("好" * 111)] == [83, 28]


@pytest.mark.parametrize(
    "word",
    [
        "https://example.com/a/b?c=d,e",
        "2024",
        "3.14",
        "ChatTTS",
        "가나다라",
        "１２：３０",
        "“一个 名字”",
        "3 GB",
        "《书 名》",
        "[uv_break]",
    ],
)
def test_words_are_not_split_where_there_is_another_place(word: str) -> None:
    for before in range(120):
        assert any(word in text for text in spans("好" * before + word + "好" * 150))


@pytest.mark.parametrize("cluster", ["e\u0323\u0301", "क्षि", "กำ", "\u1100\u1161\u11a8", "🇨🇳", "👍🏽"])
def test_clusters_are_not_split_where_there_is_another_place(cluster: str) -> None:
    for before in range(5):
        text = "x" * before + cluster * 200 + "x"
        assert all(span.strip("x") == cluster * span.count(cluster) for span in spans(text))


def test_symbols_go_with_a_neighbour() -> None:
    assert spans("*** !!! 你好。*** … \n\n ——") == ["*** !!! 你好。*** … \n\n ——"]


def test_the_article() -> None:
    parts = list(split(ARTICLE))
    prose = [part for part in parts if part.language == "zh-CN"]
    assert parts[0].spoken_text == "ChatTTS在线版实战:如何构建高并发的语音合成服务"
    assert {part.language for part in parts} == {"zh-CN", "en-US"}
    assert not any(char.isdigit() for part in parts for char in part.spoken_text)
    assert all(weight(part.spoken_text) <= 110 for part in parts)
    assert sum(weight(part.spoken_text) for part in prose) / len(prose) > 80


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("你好，世界", "zh-CN"),
        ("Hello, world", "en-US"),
        ("我們的關係很好，他唔，走了", "zh-CN"),
        ("我係學生", "yue"),
        ("你食咗飯未呀？", "yue"),
        ("唔好意思，我哋今日唔得閒。", "yue"),
        ("他在文章里引用了一句粤语“佢哋”来说明这种方言里的人称代词同普通话有所不同，别的地方仍然用普通话来写", "zh-CN"),
        ("用 Redis Bloom filter 判断文本是否已合成", "zh-CN"),
        ("The word 你好 means hello", "en-US"),
        ("Привет, мир", "en-US"),
        ("123 😀", "en-US"),
        ("", "en-US"),
        (ARTICLE, "zh-CN"),
    ],
)
def test_language(text: str, language: str) -> None:
    assert detect_language(text) == language


def test_languages_change_with_the_text() -> None:
    text = (
        "今天我们来看一个很好的例子。" * 8 + "\n" + "This is how it looks in English, word for word. " * 8 + "好，GPU。"
    )
    assert [part.language for part in split(text)] == ["zh-CN", "zh-CN", "en-US", "en-US"]
    assert spoken("我们用了 3 台 GPU。OK, that is all.")[-1].startswith("我们用了 三 台")


# --- Tags and what cannot be spoken


def test_tags_stay_as_they_are() -> None:
    assert spoken("好[laugh]的[uv_break]3个[oral_3]") == ["好[laugh]的[uv_break]三个[oral_3]"]
    assert strip_tags("好[laugh]的") == "好 的"


@pytest.mark.parametrize("text", ["[hello_world]", "[Stts]", "[spk_emb]", "[oral_99]", "[[laugh_9]]", "[LAUGH]"])
def test_other_brackets_are_read_without_them(text: str) -> None:
    assert not set("[]") & set(spoken("好" + text)[0])
    assert letters(spoken("a" + text)[0]).startswith("a" + letters(text)[:4])


def test_what_is_rejected() -> None:
    (part,) = split("好😀的👨\u200d👩\u200d👧!\x07\ue000★")
    assert part.rejected == tuple(
        Rejected(*pair) for pair in [("😀", 3), ("👨\u200d👩\u200d👧", 10), ("\x07", 29), ("\ue000", 30), ("★", 33)]
    )
    assert part.spoken_text == "好 的!"


def test_what_is_rejected_counts_from_the_start_of_the_text() -> None:
    text = "今天天气很好。" * 40 + "😀好"
    assert [one for part in split(text) for one in part.rejected] == [Rejected("😀", 21 * 40)]


# --- Text that is still being written


def test_a_segment_waits_until_its_end_is_certain() -> None:
    segmenter = Segmenter(first_characters=8)
    assert segmenter.feed("圆周率约等于3.") == []
    assert segmenter.feed("14") == []
    assert segmenter.feed("。") == []
    assert [part.spoken_text for part in segmenter.feed("然后")] == ["圆周率约等于三点一四。"]
    assert [part.spoken_text for part in segmenter.flush()] == ["然后"]


def test_a_flush_keeps_what_cannot_be_spoken_for_later() -> None:
    segmenter = Segmenter()
    assert [part.spoken_text for part in segmenter.feed("Hello there") + segmenter.flush()] == ["Hello there"]
    assert segmenter.feed("\n…") == segmenter.flush() == []
    assert [(part.start_byte, part.spoken_text) for part in segmenter.feed("You") + segmenter.flush()] == [(11, "…You")]
    assert segmenter.feed(" 😀") == []
    assert segmenter.flush(end=True) == [TextSegment(18, 23, "", "en-US", (Rejected("😀", 19),))]
    assert segmenter.flush(end=True) == []


def test_after_a_flush_the_next_segment_is_short_again() -> None:
    segmenter = Segmenter()
    for _ in range(2):
        parts = segmenter.feed("今天天气很好。" * 30) + segmenter.flush()
        assert [weight(part.spoken_text) for part in parts] == [14, 105, 91]


def test_segments_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    once = count_work(lambda: next(split(ARTICLE)), monkeypatch)
    assert count_work(lambda: next(split(ARTICLE * 8)), monkeypatch) <= once


# --- Properties


@settings(deadline=None)
@given(any_text)
def test_the_only_error_is_nothing_to_speak(text: str) -> None:
    if has_speech(text):
        assert split(text)
    else:
        with pytest.raises(ValueError, match="nothing to speak"):
            split(text)
    detect_language(text)


@settings(deadline=None)
@given(speakable, firsts, maxima)
def test_spans_partition_the_text(text: str, first: int, limit: int) -> None:
    parts = list(split(text, first_characters=first, max_characters=limit))
    assert parts[0].start_byte == 0
    assert parts[-1].end_byte == len(text.encode())
    assert all(one.end_byte == two.start_byte for one, two in itertools.pairwise(parts))
    assert "".join(spans(text, first, limit)) == text


@settings(deadline=None)
@given(speakable, firsts, maxima)
def test_every_segment_speaks_within_bounds(text: str, first: int, limit: int) -> None:
    for part in spoken(text, first, limit):
        assert has_speech(part)
        assert weight(part) <= limit
        assert part == unicodedata.normalize("NFC", " ".join(part.split()))
        assert not any(unicodedata.category(char) in ("Cc", "Cf", "So", "Co", "Cn") for char in part)


@settings(deadline=None)
@given(speakable, firsts, maxima)
def test_chinese_characters_are_spoken_in_order(text: str, first: int, limit: int) -> None:
    heard = iter("".join(spoken(text, first, limit)))
    assert all(char in heard for char in text if "\u4e00" <= char <= "\u9fff")


@settings(deadline=None)
@given(st.text(LETTERS, min_size=1, max_size=400).filter(has_speech), firsts, maxima)
def test_no_letter_is_lost(text: str, first: int, limit: int) -> None:
    assert letters("".join(spoken(text, first, limit))) == letters(text)


@settings(deadline=None)
@given(any_text, st.sampled_from(["zh-CN", "en-US", "yue", "fr-FR"]))
def test_what_is_spoken_is_spoken_the_same_again(text: str, language: str) -> None:
    once = normalize(text, language)
    assert normalize(once, language) == once


@settings(deadline=None)
@given(any_text, st.sampled_from(["zh-CN", "en-US"]))
def test_no_digit_is_left(text: str, language: str) -> None:
    said = strip_tags(normalize(text, language))
    assert not any(char.isdecimal() for char in said)


@settings(deadline=None)
@given(speakable, st.lists(st.integers(0, 500), max_size=30), firsts, maxima)
def test_pieces_make_no_difference(text: str, cuts: list[int], first: int, limit: int) -> None:
    whole = list(split(text, first_characters=first, max_characters=limit))
    assert fed(text, cuts, first, limit) == fed(text, [], first, limit) == whole


@settings(deadline=None)
@given(any_text)
def test_what_is_rejected_is_where_it_is_said_to_be(text: str) -> None:
    data = text.encode()
    for part in fed(text, []):
        for one in part.rejected:
            raw = one.character.encode()
            assert data[one.start_byte : one.start_byte + len(raw)] == raw
            assert part.start_byte <= one.start_byte < part.end_byte


# --- Work


def count_work(function: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Lines that ran in the front end, and characters of the texts that they were given."""
    work = 0
    scan = segments._scan

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal work
        if "service/text" not in frame.f_code.co_filename:
            return None
        work += 1
        return trace

    def counting_scan(text: str, quotes: int, *, whole: bool) -> Any:
        nonlocal work
        work += len(text)
        return scan(text, quotes, whole=whole)

    def counting_speak(shown: str, language: str) -> str:
        nonlocal work
        work += len(shown)
        return speak(shown, language)

    previous = sys.gettrace()
    with monkeypatch.context() as patch:
        patch.setattr(segments, "_scan", counting_scan)
        patch.setattr(segments, "speak", counting_speak)
        sys.settrace(trace)
        try:
            function()
        finally:
            sys.settrace(previous)
    return work


UNITS = [
    "(",
    ",",
    "\u0301",
    "a.",
    "\n",
    "。",
    "好",
    "好。",
    "가",
    "a",
    "a ",
    "a. ",
    "1.",
    'a"。',
    "a\u200d",
    "a\u0301",
    "1年",
]


@pytest.mark.parametrize(
    "unit", [*UNITS, "\u1161", "🇨🇳", "好" + "\u0301" * 400, "a" * 40 + " " * 400, "x。" + "(" * 400]
)
def test_work_is_linear(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    once, twice = ("a" + (unit * 5000)[:length] + "a" for length in (2500, 5000))
    consume(twice)
    assert count_work(lambda: consume(twice), monkeypatch) <= 2.6 * count_work(lambda: consume(once), monkeypatch) + 500
    assert count_work(lambda: consume(twice), monkeypatch) <= 120 * len(twice)


def consume(text: str) -> None:
    assert list(split(text))


@pytest.mark.parametrize("seed", [*fuzz_text.kept_seeds(), *range(10**6, 10**6 + 150)])
def test_fuzz(seed: int) -> None:
    fuzz_text.check(seed)
