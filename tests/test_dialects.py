from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.errors import InvalidArgument
from common.settings import LimitSettings
from protos.chorus.v1 import tts_pb2
from service.engines.base import SpeechEngine
from service.engines.espeak import LANGUAGES
from service.speech import parse
from service.text import dialects, split
from service.text.dialects import DIALECTS, apply, revision, tables
from service.text.dialects.matcher import ANYWHERE, Context, Entry, Matcher, Spelling

YUE = DIALECTS["yue"]
FOLDER = files("service.text.dialects") / "yue"
ARTICLE = (Path(__file__).parent / "data" / "article.txt").read_text()

ENTRIES = [entry for table in tables.WORDS for entry in tables.read_entries(FOLDER / table)]
PATTERNS = sorted({entry.pattern for entry in ENTRIES})
ENDS = "。！？!?；;….\n"

SENTENCES = {
    # persons, this and that
    "他们没有来。": "佢哋冇嚟。",
    "我们是朋友，是不是？": "我哋係朋友，係咪？",
    "这是什么？": "呢個係乜嘢？",
    "你是谁？": "你係邊個？",
    "那里的东西很便宜。": "嗰度嘅嘢好平。",
    "这只是一个例子。": "呢個只係一個例子。",
    "那是我的书。": "嗰個係我嘅書。",
    "哪个是你的？": "邊個係你嘅？",
    "我有些不明白。": "我有啲唔明白。",
    # questions
    "现在几点？": "而家幾點？",
    "你为什么不吃饭？": "你點解唔食飯？",
    "怎么办？": "點算？",
    "他怎么还没有来？": "佢點仲未嚟？",
    "这件衣服多少钱？": "呢件衫幾多錢？",
    "请问洗手间在哪里？": "請問洗手間喺邊度？",
    "有没有人知道？": "有冇人知？",
    "有什么事吗？": "有乜嘢事嗎？",
    # to be, to have, not
    "于是他就走了。": "於是佢就走喇。",
    "总是迟到": "成日遲到",
    "要是下雨怎么办？": "如果落雨點算？",
    "不要紧，慢慢来。": "唔緊要，慢慢嚟。",
    "没关系，不客气。": "唔緊要，唔使客氣。",
    "我看不懂这本书。": "我睇唔明呢本書。",
    "从来没有听说过。": "從來未聽講過。",
    "对不起，我来晚了。": "對唔住，我嚟晚喇。",
    "他真的不懂。": "佢真係唔明。",
    # particles and prepositions
    "谢谢你的帮助。": "多謝你嘅幫助。",
    "我吃了三个苹果。": "我食咗三個蘋果。",
    "你吃饭了吗？": "你食飯未呀？",
    "他被狗咬了。": "佢畀狗咬咗。",
    "她比以前瘦了一点。": "佢比以前瘦咗少少。",
    "我在香港工作。": "我喺香港工作。",
    "她在家吗？": "佢喺屋企嗎？",
    "从北京到上海要五个小时。": "由北京到上海要五個鐘。",
    "把它放在桌子上。": "將佢放喺枱上。",
    "让我看看。": "畀我睇下。",
    "我给你打电话。": "我打電話畀你。",
    "我和你一起去。": "我同你一齊去。",
    # time
    "星期天下午我们去游泳。": "星期日下晝我哋去游水。",
    "他在银行上班，每天早上八点坐地铁。": "佢喺銀行返工，日日朝早八點搭地鐵。",
    "我昨天看见他了。": "我尋日見到佢喇。",
    "好久不见": "好耐冇見",
    "我等了半小时。": "我等咗半個鐘。",
    # doing
    "我们今天去看电影。": "我哋今日去睇戲。",
    "下雨了，快点回家。": "落雨喇，快啲返屋企。",
    "他站起来走了。": "佢企起身走喇。",
    "你告诉我怎么走。": "你話我知點走。",
    "我忘了带钥匙。": "我唔記得帶鎖匙。",
    "他把书拿走了。": "佢將書攞走喇。",
    "堵车了。": "塞車喇。",
    # things and what they are like
    "我坐出租车回家。": "我搭的士返屋企。",
    "冰箱里有牛奶和鸡蛋。": "雪櫃入面有牛奶同雞蛋。",
    "我想买一件衬衫和一条裤子。": "我想買一件恤衫同一條褲。",
    "你喜欢吃巧克力还是冰淇淋？": "你鍾意食朱古力定係雪糕？",
    "他的手表很漂亮。": "佢嘅手錶好靚。",
    "这些孩子很聪明。": "呢啲細路好醒目。",
    "今天天气很冷。": "今日天氣好凍。",
    "孩子们在学校里玩。": "啲細路喺學校入面玩。",
    # what a service says
    "您的订单已经发货，预计明天上午送到。": "你嘅訂單已經發貨，預計聽日上晝送到。",
    "请稍等，我马上帮您查询。": "請等陣，我即刻幫你查詢。",
    "如果明天下雨的话，我就不去了。": "如果聽日落雨嘅話，我就唔去喇。",
    "当前方案只支持四种内置音色。": "當前方案只支持四種內置音色。",
    # written in traditional characters
    "我們沒有時間，他們都走了。": "我哋冇時間，佢哋都走喇。",
    "這裡的東西太貴了。": "呢度嘅嘢太貴喇。",
    "什麼時候回來？": "幾時返嚟？",
    "他說他會來。": "佢話佢會嚟。",
}

IN_CONTEXT = {
    # 的
    "我的目的是学习。": "我嘅目的係學習。",
    "我打的去机场，的士很贵。": "我搭的士去機場，的士好貴。",
    "有的人喜欢，所有的人都来了。": "有啲人鍾意，所有人都嚟喇。",
    "的确是真的。": "的確係真嘅。",
    # 是
    "但是他不知道，可是我知道。": "但係佢唔知，但係我知。",
    "是非": "是非",
    "你喝茶还是咖啡？": "你飲茶定係咖啡？",
    "我还是觉得不好看。": "我都係覺得唔好睇。",
    # 不
    "不如我们去公园吧。": "不如我哋去公園啦。",
    "不过我不喜欢。": "不過我唔鍾意。",
    "打不过他": "打唔過佢",
    "经济不断发展。": "經濟不斷發展。",
    "我觉得他不安全，也很不安。": "我覺得佢唔安全，都好不安。",
    # 在
    "问题存在，他现在在吃饭。": "問題存在，佢而家食緊飯。",
    # 看, 说, 来, 走
    "看守在看书。": "看守睇緊書。",
    "小说很好看，请说明一下。": "小說好好睇，請說明一下。",
    "老师说：“将来再说。”": "老師話：“將來再講。”",
    # 和, 从, 给, 没
    "世界和平很重要。": "世界和平好重要。",
    "他从小服从命令。": "佢由細服從命令。",
    "公司给予支持。": "公司給予支持。",
    "船沉没了，没人受伤。": "船沉沒喇，冇人受傷。",
    # 了, 那, 天, 点
    "我了解你，除了他。": "我了解你，除咗佢。",
    "那我们走吧，那么多人。": "噉我哋走啦，咁多人。",
    "三天后天气很好。": "三日後天氣好好。",
    "下午一点见，我要一点水，一点也不多。": "下晝一點見，我要少少水，一啲都唔多。",
    # 只, 家, 别, 累, 东西
    "这三只小狗只是朋友。": "呢三隻狗仔只係朋友。",
    "我家里没人，国家很大。": "我屋企冇人，國家好大。",
    "别哭了，区别很大，特别好吃。": "唔好喊咗，區別好大，特別好食。",
    "我累了，要积累经验。": "我攰喇，要積累經驗。",
    "东西方文化的东西": "東西方文化嘅嘢",
    # 他, 怕, 疼
    "其他人呢？": "其他人呢？",
    "我很怕狗，狗很可怕。": "我好驚狗，狗好可怕。",
    # one simplified character, several traditional ones
    "我发现他的头发太长。": "我發現佢嘅頭髮太長。",
    "皇后大道，以后再说。": "皇后大道，以後再講。",
    "这里很干净，饼干很好吃。": "呢度好乾淨，餅乾好好食。",
    "关系很复杂，重复三次。": "關係好複雜，重複三次。",
}

CANTONESE = [
    "早晨，去北京嘅列車九點鐘喺二號月台開出。",
    "佢哋話聽日唔得閒，不如下個禮拜先啦！",
    "我哋聽日去邊度食飯呀？",
    "我哋听日去边度食饭？",
    "今日天氣好好。",
    "唔該晒你。",
    "呢個係乜嘢嚟㗎？",
    "不過佢係我嘅男朋友，是但啦。",
    "利是、的士、看更、不嬲。",
    "係咁先，拜拜。",
]

UNTOUCHED = [
    "",
    " ",
    "Hello, world. It's 3.14!",
    "[laugh][uv_break][lbreak]",
    "https://example.com/a?b=的士".removesuffix("的士"),
    "これはペンです。",
    "안녕하세요.",
    "🙂👍🏽",
    "\ud800",
]

any_text = st.one_of(
    st.text(max_size=200),
    st.text("".join(PATTERNS) + ENDS + "嘅咗係，[a]1 ", max_size=100),
    st.lists(st.sampled_from([*PATTERNS, *SENTENCES, *CANTONESE, "，", "。", " ", "[laugh]"]), max_size=30).map(
        "".join
    ),
    st.text(st.characters(codec=None, categories=["Cs", "Mn", "Cf", "Lo", "Po"]), max_size=60),
)


# --- wording


@pytest.mark.parametrize(("text", "expected"), SENTENCES.items())
def test_a_sentence_gets_its_wording(text: str, expected: str) -> None:
    assert apply(text, "yue") == expected


@pytest.mark.parametrize(("text", "expected"), IN_CONTEXT.items())
def test_a_character_with_several_meanings_depends_on_its_context(text: str, expected: str) -> None:
    assert apply(text, "yue") == expected


def test_the_table_is_large_enough_to_mean_something() -> None:
    assert len(SENTENCES) >= 60
    assert len(IN_CONTEXT) >= 30


@pytest.mark.parametrize("text", CANTONESE)
def test_cantonese_stays_as_it_is(text: str) -> None:
    assert apply(text, "yue") == text


@pytest.mark.parametrize("text", UNTOUCHED)
def test_what_is_not_chinese_stays_as_it_is(text: str) -> None:
    assert apply(text, "yue") == text


def test_tags_and_latin_words_stay_within_chinese() -> None:
    text = "[laugh]你好[uv_break]，我是 ChatTTS 的 AI 助手，P99 不高。"
    assert apply(text, "yue") == "[laugh]你好[uv_break]，我係 ChatTTS 嘅 AI 助手，P99 唔高。"


@pytest.mark.parametrize("language", ["yue", "YUE", "yue-HK", "yue-Hant-HK"])
def test_a_dialect_is_found_by_its_tag(language: str) -> None:
    assert apply("他们", language) == "佢哋"
    assert revision(language) == YUE.revision


@pytest.mark.parametrize("language", ["", "zh-CN", "en-US", "yu", "yuexx", "-", "wuu"])
def test_other_languages_have_no_wording(language: str) -> None:
    assert apply("他们", language) == "他们"
    assert revision(language) == ""


# --- for any text


@given(any_text)
@example("好不好不好")
@example("今天本")
def test_applying_it_twice_changes_nothing_more(text: str) -> None:
    once = apply(text, "yue")
    assert apply(once, "yue") == once


@given(st.lists(any_text, max_size=6))
def test_sentences_can_be_handed_over_one_by_one(texts: list[str]) -> None:
    sentences = [text + end for text, end in zip(texts, itertools.cycle(ENDS), strict=False)]
    assert apply("".join(sentences), "yue") == "".join(apply(sentence, "yue") for sentence in sentences)


@given(any_text)
def test_what_is_no_chinese_character_comes_through_in_order(text: str) -> None:
    assert [c for c in apply(text, "yue") if c.isascii()] == [c for c in text if c.isascii()]


@pytest.mark.parametrize("text", [*SENTENCES, *IN_CONTEXT])
def test_one_pass_is_enough_for_ordinary_text(text: str) -> None:
    once = YUE.matcher.rewrite(text)
    assert YUE.matcher.rewrite(once) == once


def test_the_article_can_be_said_in_cantonese() -> None:
    spoken = apply(ARTICLE, "yue")
    assert YUE.is_spoken_in(spoken)
    assert apply(spoken, "yue") == spoken
    assert spoken.count("ChatTTS") == ARTICLE.count("ChatTTS")


@pytest.mark.parametrize(("text", "expected"), SENTENCES.items())
def test_segments_are_spoken_in_the_wording_of_their_language(text: str, expected: str) -> None:
    (segment,) = split(text, "yue")
    (plain,) = split(text, "zh-CN")
    assert segment.spoken_text == expected
    assert plain.spoken_text == text


def _lines(function: Callable[[], object]) -> int:
    """Lines of the dialects' code that run."""
    work = 0
    folder = str(Path(dialects.__file__).parent)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal work
        work += event == "line"
        return trace if frame.f_code.co_filename.startswith(folder) else None

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(previous)
    return work


@pytest.mark.parametrize(
    "unit",
    [
        "好",
        "不",
        "他们",
        "一点",
        "在",
        "不好意",
        "正在睡",
        "嘅",
        "。",
        "a",
        "他们。",
        "的话",
        "这就",
        *list(SENTENCES)[:5],
    ],
)
def test_the_work_is_linear(unit: str) -> None:
    short, long = unit * 200, unit * 800
    assert _lines(lambda: apply(long, "yue")) <= 4.4 * _lines(lambda: apply(short, "yue"))


def test_the_first_segment_costs_the_same_whatever_follows() -> None:
    sentence = "我们今天去看电影，他说他不知道什么时候回来。"
    short = _lines(lambda: next(iter(split(sentence * 8, "yue"))))
    assert 0 < _lines(lambda: next(iter(split(sentence * 200, "yue")))) <= short


# --- the matcher, with tables of its own


def _matcher(*entries: Entry, spelling: tuple[tuple[str, str, str], ...] = ()) -> Matcher:
    return Matcher(entries, Spelling(spelling))


def test_the_longest_pattern_wins_and_is_not_looked_at_again() -> None:
    assert _matcher(Entry("a", "1"), Entry("ab", "2"), Entry("bc", "3")).rewrite("abcbc aa") == "2c3 11"


def test_the_first_of_equal_patterns_that_fits_wins() -> None:
    matcher = _matcher(
        Entry("a", "1", after=Context(frozenset(("x",)))), Entry("a", "2", after=Context(frozenset(("x", "y"))))
    )
    assert matcher.rewrite("axayaz") == "1x2yaz"


def test_a_shorter_pattern_steps_in_where_the_longer_does_not_fit() -> None:
    matcher = _matcher(Entry("ab", "1", before=Context(frozenset(("x",)))), Entry("a", "2"))
    assert matcher.rewrite("xab ab") == "x1 2b"


def test_a_kept_word_hides_what_is_in_it() -> None:
    assert _matcher(Entry("ab", ""), Entry("b", "1")).rewrite("abb") == "ab1"


@pytest.mark.parametrize(
    ("context", "fits"),
    [
        (ANYWHERE, "a b,c end"),
        (Context(frozenset(("b", "c"))), "b c"),
        (Context(frozenset(("b",)), negated=True), "a , c end"),
        (Context(edge=True), ", end"),
        (Context(frozenset(("b",)), edge=True, negated=True), "a c"),
    ],
)
def test_contexts(context: Context, fits: str) -> None:
    neighbours = {"a": "a", "b": "b", "c": "c", ",": ",", "end": ""}
    wanted = set(fits.replace(",", " , ").split())
    if context.is_empty:
        wanted = set(neighbours)
    assert {name for name, text in neighbours.items() if context.fits_after("x" + text, 1)} == wanted
    assert {name for name, text in neighbours.items() if context.fits_before(text + "x", len(text))} == wanted


def test_patterns_are_found_in_both_scripts_and_the_rest_is_written_in_one() -> None:
    matcher = _matcher(Entry("说明", ""), Entry("后", "B"), spelling=(("说", "說", "説"), ("后", "后", "後")))
    assert matcher.rewrite("说說説明后後") == "說說説明BB"


def test_a_result_that_would_change_again_is_not_taken() -> None:
    restless = tables.Dialect(_matcher(Entry("a", "b"), Entry("b", "a")), {}, "")
    assert restless.convert("ab") == "ab"
    slow = tables.Dialect(_matcher(Entry("a", "b"), Entry("b", "c")), {}, "")
    assert slow.convert("ab") == "cc"


# --- the tables


@dataclass(frozen=True)
class Page:
    """A table in memory."""

    text: str
    name: str = "page.tsv"

    def read_text(self, encoding: str) -> str:
        return self.text


@pytest.mark.parametrize("line", ["\tx", "a\tb\tc\td\te"])
def test_a_bad_line_is_told(line: str) -> None:
    with pytest.raises(ValueError, match=r"page.tsv, line 3"):
        list(tables.read_entries(cast(Any, Page(f"# head\n\n{line}\n"))))


def test_a_line_is_read() -> None:
    (entry,) = tables.read_entries(cast(Any, Page("a\tb\t!x|^\ty|$")))
    assert entry == Entry("a", "b", Context(frozenset(("x",)), True, True), Context(frozenset(("y",)), True))


def test_no_line_is_there_twice() -> None:
    lines = [line for table in tables.WORDS for line in tables.read_rows(FOLDER / table, 4)]
    assert len(set(lines)) == len(lines)
    assert len({(pattern, before, after) for pattern, _, before, after in lines}) == len(lines)
    characters = [row[0] for row in tables.read_rows(FOLDER / tables.CHARACTERS, 3)]
    assert len(set(characters)) == len(characters)


def test_a_few_hundred_words_are_there() -> None:
    assert len(ENTRIES) >= 500


def test_every_file_says_where_it_comes_from() -> None:
    for table in (*tables.WORDS, tables.MARKS, tables.CHARACTERS):
        head = (FOLDER / table).read_text("utf-8").split("\n\n")[0]
        assert "# Source: " in head
        assert any(name in head for name in ("AGPL", "Apache", "CC BY 4.0"))


def test_patterns_are_in_simplified_characters_without_sentence_ends() -> None:
    for entry in ENTRIES:
        assert YUE.matcher.fold(entry.pattern) == entry.pattern
        assert not set(ENDS) & set(entry.pattern + entry.replacement)


def _around(context: Context, others: list[str]) -> list[str]:
    return ["", *others] if context.negated or context.is_empty else [*context.words, ""]


def _places(entry: Entry) -> list[tuple[str, int]]:
    """Texts in which an entry should be used, and where."""
    befores = [*_around(entry.before, ["我", "上", "很", "去"]), "，"]
    afters = [*_around(entry.after, ["我", "上", "一", "去", "东"]), "，"]
    return [(before + entry.pattern + after, len(before)) for before in befores for after in afters]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.pattern)
def test_every_entry_can_be_reached(entry: Entry) -> None:
    assert any(YUE.matcher.find(text, at) == entry for text, at in _places(entry))


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.replacement], ids=lambda entry: entry.pattern)
def test_no_entry_undoes_another(entry: Entry) -> None:
    assert YUE.convert(entry.replacement) == entry.replacement
    assert YUE.matcher.rewrite(entry.replacement) == entry.replacement


def test_no_character_is_rewritten_twice() -> None:
    for _, written, _ in tables.read_rows(FOLDER / tables.CHARACTERS, 3):
        assert YUE.matcher.write(written) == written


def test_no_wording_of_standard_chinese_is_taken_for_a_mark() -> None:
    assert not [entry.pattern for entry in ENTRIES if YUE.is_spoken_in(entry.pattern)]
    assert not [text for text in (*SENTENCES, *IN_CONTEXT) if YUE.is_spoken_in(text)]


# --- what is served


@dataclass
class Engine:
    """As much of an engine as `parse` looks at."""

    languages: tuple[str, ...]
    voices: tuple[str, ...] = ("female1",)
    name: str = "engine"
    model_revision: str = "1"
    caps: Any = field(default_factory=lambda: type("Caps", (), {"sample_rate_hertz": 24000}))


def _parse(language: str, languages: tuple[str, ...]) -> list[str]:
    request = tts_pb2.SynthesizeRequest(text="他们没有来。", language=language)
    manner = parse(request, cast(SpeechEngine, Engine(languages)), LimitSettings())
    return [part.language for part in split(request.text, manner.language)]


@pytest.mark.parametrize("language", ["yue", "yue-HK", "zh-HK", "zh-yue"])
def test_cantonese_is_served_by_an_engine_that_speaks_it(language: str) -> None:
    assert _parse(language, tuple(LANGUAGES)) == ["yue"]


@pytest.mark.parametrize("language", ["wuu", "hak", "nan-TW", "yuex"])
def test_a_dialect_that_nobody_serves_is_refused_with_what_is_served(language: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        _parse(language, ("en-US", "yue", "zh-CN"))
    assert "served are en-US, yue, zh-CN" in str(refused.value)


@pytest.mark.parametrize("language", sorted(DIALECTS))
def test_tables_alone_do_not_offer_a_dialect(language: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        _parse(language, ("en-US", "zh-CN"))
    assert "served are en-US, zh-CN" in str(refused.value)


def test_espeak_speaks_every_dialect_that_has_tables() -> None:
    assert set(DIALECTS) <= {language.lower() for language in LANGUAGES}
