"""How texts are said, by table. `python -m bench.text` prints the same scores."""

import random
import re
from collections import defaultdict

import pytest

from bench.text import Case, cases
from service.text import fallback, normalize, warm_up, warm_up_rare
from service.text.en import rules as en_rules
from service.text.numbers import en_integer, en_ordinal, en_year, roman, zh_integer
from service.text.zh import rules as zh_rules

KINDS: dict[str, list[Case]] = defaultdict(list)
for case in cases():
    KINDS[case.kind].append(case)
FLOOR = 0.95


@pytest.fixture(autouse=True, scope="module")
def warm() -> None:
    warm_up()
    warm_up_rare()


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_said_right(kind: str) -> None:
    missed = [
        f"{case.written!r}: said {said!r}, not {case.spoken[0]!r}"
        for case in KINDS[kind]
        if not case.is_met(said := normalize(case.written, case.language))
    ]
    print(*missed, sep="\n")
    assert 1 - len(missed) / len(KINDS[kind]) >= FLOOR, "\n".join(missed)


def test_the_tables_are_several_hundred_texts() -> None:
    assert sum(map(len, KINDS.values())) >= 400
    assert len(KINDS) >= 20


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_is_said_the_same_again(kind: str) -> None:
    for case in KINDS[kind]:
        once = normalize(case.written, case.language)
        assert normalize(once, case.language) == once


@pytest.mark.parametrize(
    ("digits", "chinese", "english"),
    [
        ("0", "零", "zero"),
        ("10", "十", "ten"),
        ("110", "一百一十", "one hundred and ten"),
        ("2000", "两千", "two thousand"),
        ("12000", "一万两千", "twelve thousand"),
        ("50010", "五万零一十", "fifty thousand and ten"),
        ("1000001", "一百万零一", "one million and one"),
        ("10010000", "一千零一万", "ten million ten thousand"),
        ("101000111", "一亿零一百万零一百一十一", "one hundred one million one hundred and eleven"),
        ("100000010000", "一千亿零一万", "one hundred billion ten thousand"),
        ("007", "零零七", "zero zero seven"),
    ],
)  # fmt: skip
def test_integers(digits: str, chinese: str, english: str) -> None:
    assert zh_integer(digits) == chinese
    assert en_integer(digits) == english


_ZH_VALUES = {char: value for value, char in enumerate("零一二三四五六七八九")} | {"两": 2}
_ZH_PLACES = {"十": 10, "百": 100, "千": 1000}


def read_back(said: str) -> int:
    """A Chinese number's value, by another way than it was made."""
    for scale, value in (("万亿", 10**12), ("亿", 10**8), ("万", 10**4)):
        head, found, tail = said.partition(scale)
        if found:
            return read_back(head) * value + read_back(tail)
    total = value = 0
    for char in said:
        if char in _ZH_PLACES:
            total += (value or 1) * _ZH_PLACES[char]
            value = 0
        else:
            value = _ZH_VALUES[char]
    return total + value


def test_chinese_integers_are_read_back() -> None:
    chance = random.Random(3)
    for _ in range(3000):
        value = chance.randrange(10 ** chance.randrange(1, 16))
        assert read_back(zh_integer(str(value))) == value


def test_ordinals_years_and_roman_numerals() -> None:
    assert [en_ordinal(digits) for digits in ("1", "12", "20", "33")] == [
        "first",
        "twelfth",
        "twentieth",
        "thirty third",
    ]
    assert [en_year(digits) for digits in ("1066", "1905", "2000", "2024")] == [
        "ten sixty six",
        "nineteen oh five",
        "two thousand",
        "twenty twenty four",
    ]
    assert [roman(letters) for letters in ("XIV", "viii", "IIII", "ABC")] == ["14", "8", "", ""]


def test_wetext_is_asked_for_what_our_rules_do_not_know_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(text: str, language: str) -> str:
        asked.append(text)
        return ""

    monkeypatch.setattr(fallback, "_normalize", ask)
    normalize("2024年1月5日，¥3,500.50的GPU有3GB显存，P99是1.2s，占60%。", "zh-CN")
    normalize("On March 5, 2024 it took $1,234.56, 3 GB and 30ms.", "en-US")
    assert asked == []
    assert normalize("含0.5mol盐", "zh-CN") == "含零点五mol盐"
    assert asked == ["0.5mol"]


@pytest.mark.parametrize("rules", [zh_rules, en_rules], ids=["zh", "en"])
def test_each_rule_agrees_with_the_pattern_of_all(rules: object) -> None:
    """Groups are taken out of patterns by pattern; a bracket in a class would be taken for one."""
    rules.compile()  # type: ignore[attr-defined]
    every = rules._any  # type: ignore[attr-defined]
    assert every.groups == len(rules._rules)  # type: ignore[attr-defined]
    assert not re.search(r"\[[^\]\\]*(?<!\\)\((?!\?:)[^\]]*\]", every.pattern)


@pytest.mark.parametrize(
    "unit",
    ["1", "1,", "1.", "1-", "1/", "1:", "a.", "a@", "a-", "a1", "1a", "[", "[a", "v1.", "/a", "#", "$", "$1", "1e",
     "1 ", "http://", "I", "St. ", "1年", "第", "%", "1%-", "2024-01-", "w/", "+1 ", "x^2", "'", "-", "“",
     "aa.com/", "1k"],
)  # fmt: skip
@pytest.mark.parametrize("language", ["zh-CN", "en-US"])
def test_no_text_takes_long(unit: str, language: str) -> None:
    """A segment's worth of a text that goes on and on; a pattern that backtracks would not return."""
    assert normalize((unit * 600)[:600], language) is not None
