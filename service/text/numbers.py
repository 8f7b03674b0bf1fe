"""Numbers in words, Chinese and English. Numbers come as strings of ASCII digits, so that none is too long."""

from __future__ import annotations

_ZH_DIGITS = "零一二三四五六七八九"
_ZH_PLACES = ("千", "百", "十", "")
_ZH_GROUPS = ("", "万", "亿", "万亿")
_ZH_LONGEST = 4 * len(_ZH_GROUPS)

_EN_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_EN_TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_EN_GROUPS = ("", " thousand", " million", " billion", " trillion", " quadrillion", " quintillion")
_EN_LONGEST = 3 * len(_EN_GROUPS)
_EN_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
_ROMAN = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}

_ZH_DIGIT_BY_DIGIT = str.maketrans("0123456789", _ZH_DIGITS)
_ZH_TELEPHONE = str.maketrans("0123456789", "零幺二三四五六七八九")


def zh_digits(digits: str) -> str:
    """`2024` → 二零二四."""
    return digits.translate(_ZH_DIGIT_BY_DIGIT)


def zh_telephone(digits: str) -> str:
    """`110` → 幺幺零."""
    return digits.translate(_ZH_TELEPHONE)


def zh_integer(digits: str, *, liang: bool = False) -> str:
    """`3500` → 三千五百. Digit by digit where a zero leads or no one could follow.

    Args:
        digits: of any number.
        liang: read a lone 2 as 两, as before a measure word.
    """
    if len(digits) > _ZH_LONGEST or (digits[0] == "0" and len(digits) > 1):
        return zh_digits(digits)
    if digits in ("0", "2"):
        return {"0": "零", "2": "两" if liang else "二"}[digits]
    groups = _groups(digits, 4)
    said = ""
    for at, group in enumerate(groups):
        power = len(groups) - 1 - at
        if group.strip("0"):
            gap = bool(said) and (group[0] == "0" or (groups[at - 1][-1] == "0" and not groups[at - 1].strip("0")))
            said += ("零" if gap else "") + _zh_group(group.zfill(4), first=not said, scaled=power > 0)
            said += _ZH_GROUPS[power]
    return said


def _zh_group(group: str, *, first: bool, scaled: bool) -> str:
    """Four digits, not all 0."""
    if first and scaled and group == "0002":
        return "两"
    said = ""
    gap = False
    for digit, place in zip(group, _ZH_PLACES, strict=True):
        if digit == "0":
            gap = bool(said)
            continue
        name = "两" if digit == "2" and place in ("千", "百") else _ZH_DIGITS[int(digit)]
        said += ("零" if gap else "") + name + place
        gap = False
    return said[1:] if first and said.startswith("一十") else said


def zh_number(number: str, *, liang: bool = False) -> str:
    """`1,234.50` → 一千二百三十四点五零; `-3` → 负三."""
    sign = {"-": "负", "−": "负", "+": "正", "±": "正负"}.get(number[0], "")
    whole, point, fraction = number.lstrip("+-−±").replace(",", "").partition(".")
    said = zh_integer(whole or "0", liang=liang and not point)
    return sign + said + ("点" + zh_digits(fraction) if point else "")


def en_digits(digits: str) -> str:
    """`405` → four zero five."""
    return " ".join(_EN_ONES[int(digit)] for digit in digits)


def en_integer(digits: str) -> str:
    """`3500` → three thousand five hundred. Digit by digit where a zero leads or no one could follow."""
    if len(digits) > _EN_LONGEST or (digits[0] == "0" and len(digits) > 1):
        return en_digits(digits)
    if digits == "0":
        return "zero"
    groups = _groups(digits, 3)
    said = [
        _en_group(int(group), last=power == 0) + _EN_GROUPS[power]
        for power, group in zip(range(len(groups) - 1, -1, -1), groups, strict=True)
        if group.strip("0")
    ]
    if len(said) > 1 and 0 < int(groups[-1]) < 100:
        said.insert(-1, "and")
    return " ".join(said)


def _en_group(value: int, *, last: bool) -> str:
    hundreds, rest = divmod(value, 100)
    said = []
    if hundreds:
        said.append(f"{_EN_ONES[hundreds]} hundred")
    if hundreds and rest and last:
        said.append("and")
    if rest:
        said.append(_en_below_hundred(rest))
    return " ".join(said)


def _en_below_hundred(value: int) -> str:
    if value < 20:
        return _EN_ONES[value]
    tens, ones = divmod(value, 10)
    return _EN_TENS[tens] + (f" {_EN_ONES[ones]}" if ones else "")


def en_number(number: str) -> str:
    """`1,234.5` → one thousand two hundred and thirty four point five; `-3` → minus three."""
    sign = {"-": "minus ", "−": "minus ", "+": "plus ", "±": "plus or minus "}.get(number[0], "")
    whole, point, fraction = number.lstrip("+-−±").replace(",", "").partition(".")
    said = [en_integer(whole)] if whole else []
    return sign + " ".join([*said, "point", en_digits(fraction)] if point else said)


def en_ordinal(digits: str) -> str:
    """`21` → twenty first."""
    head, space, last = en_integer(digits).rpartition(" ")
    regular = last[:-1] + "ieth" if last.endswith("y") else last + "th"
    return head + space + _EN_ORDINALS.get(last, regular)


def en_year(digits: str) -> str:
    """`2024` → twenty twenty four, `1905` → nineteen oh five, `2005` → two thousand five."""
    if len(digits) != 4 or digits[1:3] == "00" or digits[0] == "0":
        return en_integer(digits).replace(" and ", " ")
    century, rest = en_integer(digits[:2]), digits[2:]
    if rest == "00":
        return f"{century} hundred"
    return f"{century} oh {_EN_ONES[int(rest[1])]}" if rest[0] == "0" else f"{century} {en_integer(rest)}"


def roman(numeral: str) -> str:
    """`XIV` → `14`; empty where the letters are no Roman numeral."""
    values = [_ROMAN.get(letter, 0) for letter in numeral.upper()]
    total = sum(-a if a < b else a for a, b in zip(values, [*values[1:], 0], strict=True))
    return str(total) if total > 0 and _to_roman(total) == numeral.upper() else ""


def _to_roman(value: int) -> str:
    if value >= 4000:
        return ""
    said = ""
    for worth, letters in zip(
        (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),
        ("M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"),
        strict=True,
    ):
        count, value = divmod(value, worth)
        said += letters * count
    return said


def _groups(digits: str, size: int) -> list[str]:
    """Splits digits from the right, but for the first group each `size` long."""
    first = len(digits) % size
    return [digits[:first]][: bool(first)] + [digits[at : at + size] for at in range(first, len(digits), size)]
