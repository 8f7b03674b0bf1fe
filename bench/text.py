"""The text front end: how well and how fast it reads, beside plain wetext on the same texts.

`python -m bench.text --quick --json`. Scores are shares of the texts in `tests/data/spoken/` that are spoken in one of
the ways that are right. Times are the best of several runs.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import dialects
from service.text import detect_language, normalize, split, warm_up, warm_up_rare

TABLES = Path(__file__).parent.parent / "tests" / "data" / "spoken"
ARTICLE = Path(__file__).parent.parent / "tests" / "data" / "article.txt"
_CJK = "\u3000-\u303f\u4e00-\u9fff\uff00-\uff65"
_BESIDE_CHINESE = re.compile(rf"(?<=[{_CJK}])\s+|\s+(?=[{_CJK}])")

_ZH = "去年双十一，我们接进了客服机器人，凌晨12:30一过，请求从20飙到800，P99冲到5 s，显存占3 GB左右，60%的文本重复。"
_EN = "On March 5, 2024 it took 1,234 requests per second, 60% of them repeated, and P99 rose to 5 s at 3:30 pm. "

Say = Callable[[str, str], str]
"""Text, language → what is said."""


@dataclass(frozen=True)
class Case:
    """A text and the ways to speak it that are right."""

    kind: str
    language: str
    written: str
    spoken: tuple[str, ...]

    def is_met(self, said: str) -> bool:
        """Whether this was said, whatever the spaces and the case."""
        return fold(said) in map(fold, self.spoken)


def cases() -> list[Case]:
    """All texts of the tables."""
    return [
        Case(table.stem, *_row(table.stem, line))
        for table in sorted(TABLES.glob("*.tsv"))
        for line in table.read_text("utf-8").splitlines()
    ]


def _row(kind: str, line: str) -> tuple[str, str, tuple[str, ...]]:
    written, *spoken = line.split("\t")
    language = {"zh": "zh-CN", "en": "en-US"}.get(kind.partition("_")[0]) or detect_language(written)
    return language, written, tuple(spoken)


def fold(text: str) -> str:
    """Without what cannot be heard: case, width, spaces beside Chinese characters, commas in English."""
    text = " ".join(text.casefold().replace("，", ",").replace("：", ":").split())
    if re.search("[\u4e00-\u9fff]", text):
        return _BESIDE_CHINESE.sub("", text)
    return " ".join(re.sub('[,"]', " ", text).split())


def plain_wetext() -> Say:
    """What wetext alone says; nothing where it fails."""
    from wetext import Normalizer

    normalizers = {"zh": Normalizer(lang="zh"), "en": Normalizer(lang="en")}

    def say(text: str, language: str) -> str:
        try:
            return str(normalizers["en" if language == "en-US" else "zh"].normalize(text))
        except AssertionError:
            return ""

    return say


def scores(say: Say) -> dict[str, float]:
    """Kind → share of its texts that are said right."""
    met: dict[str, list[bool]] = {}
    for case in cases():
        met.setdefault(case.kind, []).append(case.is_met(say(case.written, case.language)))
    whole = [one for kind in met.values() for one in kind]
    return {kind: sum(ones) / len(ones) for kind, ones in met.items()} | {"all": sum(whole) / len(whole)}


def measure(quick: bool) -> dict[str, float]:
    """Every figure by name."""
    warm_up()
    warm_up_rare()
    runs = 5 if quick else 25
    zh, en = (text * (2000 // len(text)) for text in (_ZH, _EN))
    article = (ARTICLE.read_text("utf-8") * 3)[:5000]
    wetext = plain_wetext()
    figures = {
        "us_per_char_zh": _best(lambda: list(split(zh)), runs) / len(zh),
        "us_per_char_en": _best(lambda: list(split(en)), runs) / len(en),
        "us_per_char_article": _best(lambda: list(split(article)), runs) / len(article),
        "first_segment_us": _best(lambda: next(split(article)), runs),
        "first_segment_dense_us": _best(lambda: next(split(zh)), runs),
        "us_per_char_wetext_zh": _best(lambda: wetext(_ZH, "zh-CN"), 3) / len(_ZH),
        "us_per_char_wetext_en": _best(lambda: wetext(_EN, "en-US"), 3) / len(_EN),
    }
    figures |= {f"score.{kind}": score for kind, score in scores(normalize).items()}
    figures |= dialects.measure(rounds=20 if quick else 40)
    return figures | {f"score_wetext.{kind}": score for kind, score in scores(wetext).items()}


def _best(run: Callable[[], object], runs: int) -> float:
    """The shortest of several runs, in microseconds."""
    shortest = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        run()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest * 1e6


def show(figures: dict[str, float]) -> None:
    """Prints tables for people."""
    console = Console()
    times = Table("figure", "value")
    for name, value in figures.items():
        if "score" not in name:
            times.add_row(name, f"{value:,.3f}")
    console.print(times)
    table = Table("kind", "texts", "ours", "wetext")
    kinds = [case.kind for case in cases()]
    for kind in [*dict.fromkeys(kinds), "all"]:
        count = kinds.count(kind) if kind != "all" else len(kinds)
        table.add_row(kind, str(count), f"{figures[f'score.{kind}']:.1%}", f"{figures[f'score_wetext.{kind}']:.1%}")
    console.print(table)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_args()
    figures = measure(args.quick)
    if args.json:
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}, ensure_ascii=False))
    else:
        show(figures)


if __name__ == "__main__":
    main()
