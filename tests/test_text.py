import itertools
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.text import FRONT_END_REVISION, TextSegment, detect_language, has_speech, segments, split
from service.text.segments import weight

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
]
any_text = st.one_of(
    st.text(max_size=400),
    st.text(NASTY, max_size=400),
    st.lists(st.sampled_from(WORDS), max_size=150).map("".join),
)
speakable = any_text.filter(has_speech)
firsts = st.integers(1, 130)
maxima = st.integers(40, 130)


def spoken(text: str, first: int = 40, limit: int = 120) -> list[str]:
    return [part.spoken_text for part in split(text, first_characters=first, max_characters=limit)]


def spans(text: str, first: int = 40, limit: int = 120) -> list[str]:
    data = text.encode()
    parts = split(text, first_characters=first, max_characters=limit)
    return [data[part.start_byte : part.end_byte].decode() for part in parts]


def speech(text: str) -> str:
    """Letters and digits, taken apart: what a mark is composed with may change, letters may not."""
    return "".join(filter(has_speech, unicodedata.normalize("NFD", text)))


def pieces(text: str) -> list[str]:
    """Where a text would be split at pauses if segments were as short as they can be."""
    scan = segments._scan(text)
    ends = [at for at, level in enumerate(scan.pauses) if level]
    return [text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)]) if start < end]


# --- Examples


def test_a_short_text_is_one_segment() -> None:
    assert split("你好，世界。") == [TextSegment(0, 18, "你好，世界。", "zh-CN")]


def test_the_language_given_is_kept() -> None:
    assert [segment.language for segment in split("你好。" * 60, "yue")] == ["yue"] * 3


def test_the_revision_has_a_name() -> None:
    assert FRONT_END_REVISION == "text-1"


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n\n b\t\tc\u3000d", "a b c d"),
        ("\ufeffa\u200bb\u00adc\0d\x07e", "abc d e"),
        ("e\u0301 e\u200d\u0301", "é é"),
        ("1\ufe0f\u20e3 👨\u200d👩\u200d👧 ❤️", "1 👨👩👧 ❤"),
        ("a\u3164b \u115f", "ab"),
        ("a " + "=" * 99 + " b", "a " + "=" * 14 + " b"),
        ("a" + "\u0301" * 99, "á" + "\u0301" * 15),
        ("ﬁ ½ Ⅳ ①", "ﬁ ½ Ⅳ ①"),
    ],
)
def test_what_is_spoken(text: str, expected: str) -> None:
    assert spoken(text) == [expected]


@pytest.mark.parametrize("text", ["", " \n", "。。。", "...", "😀👍🏽", "\0", "\u0301", "\u3164\u115f", "_-_", "€%"])
def test_nothing_to_speak(text: str) -> None:
    assert not has_speech(text)
    with pytest.raises(ValueError, match="nothing to speak"):
        split(text)


@pytest.mark.parametrize("text", ["a", "1", "好", "٣", "½", "กำ", "(((가", "\u0301é", "ⅷ"])
def test_something_to_speak(text: str) -> None:
    assert has_speech(text)
    assert len(split(text)) == 1


def test_a_limit_too_small_for_any_text() -> None:
    with pytest.raises(ValueError, match="at least 40"):
        split("好", max_characters=39)


def test_the_first_segment_is_short() -> None:
    assert spoken("今天天气很好。" * 30)[0] == "今天天气很好。" * 5
    assert spoken("今天天气很好，" * 30)[0] == "今天天气很好，" * 5
    assert spoken("好。" + "今天天气很好，" * 30)[0] == "好。" + "今天天气很好，" * 5


def test_without_a_pause_near_the_first_segment_ends_at_the_next() -> None:
    assert spoken("好" * 60 + "，" + "好" * 90) == ["好" * 60 + "，", "好" * 90]


def test_neighbours_are_merged_up_to_the_limit() -> None:
    assert [weight(text) for text in spoken("今天天气很好。" * 60)] == [35, 119, 119, 112, 35]


def test_a_sentence_that_fits_is_not_split() -> None:
    long = "今天，" * 35 + "好。"
    assert spoken("你好，世界。" * 6 + long) == ["你好，世界。" * 6, long]


def test_a_long_sentence_is_split_at_clauses_then_spaces_then_characters() -> None:
    assert spoken("今天天气，" * 40, first=1)[1:] == ["今天天气，" * 24, "今天天气，" * 15]
    assert all(text.endswith("word") for text in spoken("word " * 200))
    assert [len(text) for text in spoken("好" * 250)] == [120, 100, 30]
    assert all(weight(text) <= 120 for text in spoken("a" * 5000))


def test_no_segment_is_a_word_or_two() -> None:
    assert [len(text) for text in spoken("好" * 121)] == [91, 30]
    assert spoken("今天天气很好，" * 5 + "我们出去玩吧，好。") == [
        "今天天气很好，" * 4,
        "今天天气很好，我们出去玩吧，好。",
    ]


@pytest.mark.parametrize("word", ["https://example.com/a/b?c=d,e", "2024", "3.14", "ChatTTS", "가나다라", "１２：３０"])
def test_words_are_not_split_where_there_is_another_place(word: str) -> None:
    for before in range(120):
        assert any(word in text for text in spoken("好" * before + word + "好" * 150))


@pytest.mark.parametrize("cluster", ["e\u0323\u0301", "क्षि", "กำ", "\u1100\u1161\u11a8", "🇨🇳", "👍🏽"])
def test_clusters_are_not_split_where_there_is_another_place(cluster: str) -> None:
    for before in range(5):
        text = "x" * before + cluster * 200 + "x"
        assert all(span.strip("x") == cluster * span.count(cluster) for span in spans(text))


def test_symbols_go_with_a_neighbour() -> None:
    assert spans("*** !!! 你好。*** … \n\n ——") == ["*** !!! 你好。*** … \n\n ——"]


def test_the_article() -> None:
    parts = split(ARTICLE)
    text = "".join(part.spoken_text for part in parts)
    assert "".join(text.split()) == "".join(unicodedata.normalize("NFC", ARTICLE).split())
    assert {part.language for part in parts} == {"zh-CN"}
    assert parts[0].spoken_text == "ChatTTS在线版实战:如何构建高并发的语音合成服务"
    assert all(weight(part.spoken_text) <= 120 for part in parts)
    assert sum(weight(part.spoken_text) for part in parts) / len(parts) > 80


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


# --- Properties


@given(any_text)
def test_the_only_error_is_nothing_to_speak(text: str) -> None:
    if has_speech(text):
        assert split(text)
    else:
        with pytest.raises(ValueError, match="nothing to speak"):
            split(text)
    detect_language(text)


@given(speakable, firsts, maxima)
def test_spans_partition_the_text(text: str, first: int, limit: int) -> None:
    parts = split(text, first_characters=first, max_characters=limit)
    assert parts[0].start_byte == 0
    assert parts[-1].end_byte == len(text.encode())
    assert all(one.end_byte == two.start_byte for one, two in itertools.pairwise(parts))
    assert "".join(spans(text, first, limit)) == text


@given(speakable, firsts, maxima)
def test_every_segment_speaks_within_bounds(text: str, first: int, limit: int) -> None:
    for part in spoken(text, first, limit):
        assert has_speech(part)
        assert weight(part) <= limit
        assert part == unicodedata.normalize("NFC", " ".join(part.split()))
        assert not any(unicodedata.category(char) in ("Cc", "Cf") for char in part)


@given(speakable, firsts, maxima)
def test_no_letter_or_digit_is_lost(text: str, first: int, limit: int) -> None:
    assert speech("".join(spoken(text, first, limit))) == speech(text)


@given(speakable, firsts, maxima)
def test_splitting_what_is_spoken_again_loses_nothing(text: str, first: int, limit: int) -> None:
    for part in spoken(text, first, limit):
        assert speech("".join(spoken(part))) == speech(part)


# --- Work


def count_work(function: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Lines that ran in the front end, and characters in the windows that it searched."""
    work = 0
    window = segments._window

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal work
        if not frame.f_code.co_filename.endswith("segments.py"):
            return None
        work += 1
        return trace

    def counting_window(scan: segments._Scan, start: int, limit: int) -> tuple[int, int, int]:
        nonlocal work
        low, floor, high = window(scan, start, limit)
        work += max(low, high) - start
        return low, floor, high

    previous = sys.gettrace()
    with monkeypatch.context() as patch:
        patch.setattr(segments, "_window", counting_window)
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
    split(twice)
    assert count_work(lambda: split(twice), monkeypatch) <= 2.3 * count_work(lambda: split(once), monkeypatch) + 200
    assert count_work(lambda: split(twice), monkeypatch) <= 40 * len(twice)
