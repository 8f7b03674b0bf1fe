"""How English says what is written in digits, letters and symbols."""

from __future__ import annotations

import re
import unicodedata

from service.text import fallback
from service.text.en_words import (
    ABBREVIATIONS,
    CURRENCIES,
    DAYS,
    MONEY_PLURALS,
    MONTHS,
    NAMES,
    OPERATORS,
    PER,
    PER_SECOND,
    PLURALS,
    SCALES,
    STOPS,
    SYMBOLS_IN_NAMES,
    UNITS,
)
from service.text.numbers import en_digits, en_integer, en_number, en_ordinal, en_year, roman
from service.text.rules import DASH, EMAIL, FILE_OR_MEMBER, NUMBER, URL, VERSION, Rules

rules = Rules(r"²³0-9A-Za-z#¥￥$€£₩₽₹+\-−±.&@=<>≤≥≈≠×÷→*/_~№Ⅰ-Ⅿⅰ-ⅿ^%‰°|()\\`'’")


def _either(*words: object) -> str:
    flat = [word for group in words if isinstance(group, dict) for word in group]
    return "|".join(re.escape(word) for word in sorted(flat, key=len, reverse=True))


_UNIT = rf"(?:{_either(UNITS, PER_SECOND)})"
_MONEY = rf"(?:{_either(CURRENCIES)})"
_MONTH = rf"(?:{_either(MONTHS)})\.?"
_FREE = r"(?<![A-Za-z0-9_.])"
_SIGN = r"(?:(?<![\w)\]%])[-−+±])?"


def _name(text: str) -> str:
    said = (SYMBOLS_IN_NAMES.get(part) or (en_digits(part) if part.isdecimal() else part) for part in _parts(text))
    return " ".join(part for part in said if part not in "{}")


def _parts(text: str) -> list[str]:
    return re.findall(r"\d+|[^\W\d_]+|.", text)


def _count(number: str, name: str) -> str:
    """`1`, kilogram → one kilogram; `2.5` → two point five kilograms."""
    first, space, rest = name.partition(" ")
    if number.lstrip("+-−±") == "1":
        return f"{en_number(number)} {name}"
    if first in ("degree", "square", "cubic"):
        many = first + "s" + space + rest if first == "degree" else f"{first} {_plural(rest)}"
    else:
        many = _plural(name)
    return f"{en_number(number)} {many}"


def _plural(name: str) -> str:
    return name if name.endswith("hertz") else PLURALS.get(name, name + "s")


def _quantity(number: str, unit: str) -> str:
    if unit in PER_SECOND:
        return _count(number, PER_SECOND[unit]) + " per second"
    return _count(number, UNITS[unit])


# --- Addresses


@rules.rule(EMAIL)
def _email(m: re.Match[str]) -> str:
    return _name(m[0])


@rules.rule(URL)
def _url(m: re.Match[str]) -> str:
    return _name(m[0])


@rules.rule(r"(?<![\w/.])/[A-Za-z_{][\w{}-]*+(?:/[\w{}.-]++)*+")
def _path(m: re.Match[str]) -> str:
    return _name(m[0].replace("_", " ").replace("{", "").replace("}", ""))


# --- Words


@rules.rule(rf"(?<![A-Za-z.])(?:{_either(ABBREVIATIONS)})(?![A-Za-z])")
def _abbreviation(m: re.Match[str]) -> str:
    said = ABBREVIATIONS[m[0]]
    if m[0] in STOPS and re.match(r"\s*$|\s+[A-Z]", m.string[m.end() : m.end() + 4]):
        return said + "."
    return said


@rules.rule(r"(?<![A-Za-z])St\.(?=\s[A-Z])(?<![a-z]\sSt\.)(?<!\dth St\.)")
def _saint(_: re.Match[str]) -> str:
    return "Saint"


@rules.rule(r"(?<=[A-Za-z]\s)St\.")
def _street(m: re.Match[str]) -> str:
    return "Street" + ("." if re.match(r"\s*$|\s+[A-Z]", m.string[m.end() : m.end() + 4]) else "")


@rules.rule(rf"(?<![A-Za-z])({_either(DAYS)})\.?(?:{DASH}({_either(DAYS)})\.?(?![A-Za-z])|(?<=\.)(?=,))")
def _weekdays(m: re.Match[str]) -> str:
    return DAYS[m[1]] + (f" to {DAYS[m[2]]}" if m[2] else "")


# --- Dates and times


_DAY = r"(?:0?[1-9]|[12]\d|3[01])"
_NOT_LONGER = r"(?![\w-]|[.:/]\d)"
_ONCE = list(dict.fromkeys(MONTHS.values()))


def _day_of(day: str, month: str, year: str | None) -> str:
    name = MONTHS.get(month.rstrip(".")) or _ONCE[int(month) - 1]
    return f"the {en_ordinal(day.lstrip('0'))} of {name}" + (f", {en_year(year)}" if year else "")


@rules.rule(rf"(?<![\w/.-])(\d{{4}})-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01]){_NOT_LONGER}")
def _iso_date(m: re.Match[str]) -> str:
    return _day_of(m[3], m[2], m[1])


@rules.rule(rf"(?<!\w)({_MONTH})\s({_DAY})(?:st|nd|rd|th)?(?:,?\s(\d{{4}}))?{_NOT_LONGER}")
def _month_and_day(m: re.Match[str]) -> str:
    return _day_of(m[2], m[1], m[3])


@rules.rule(rf"(?<![\w/.-])({_DAY})(?:st|nd|rd|th)?\s({_MONTH})(?:,?\s(\d{{4}}))?{_NOT_LONGER}")
def _day_and_month(m: re.Match[str]) -> str:
    return _day_of(m[1], m[2], m[3])


@rules.rule(rf"(?<!\w)({_MONTH}),?\s((?:1[6-9]|20)\d\d){_NOT_LONGER}")
def _month_and_year(m: re.Match[str]) -> str:
    return f"{MONTHS[m[1].rstrip('.')]} {en_year(m[2])}"


@rules.rule(
    rf"(?<![\w/.-])({_DAY})/({_DAY})/((?:19|20)\d\d)(?![\w/-])|(?<![\w/.-])((?:19|20)\d\d)/(\d\d?)/({_DAY})(?![\w/-])"
)
def _slashed_date(m: re.Match[str]) -> str:
    month, day, year = (m[1], m[2], m[3]) if m[1] else (m[5], m[6], m[4])
    if int(month) > 12:
        month, day = day, month
    if int(month) > 12:
        return f"{en_integer(month.lstrip('0'))} {en_integer(day.lstrip('0'))} {en_year(year)}"
    return f"{_ONCE[int(month) - 1]} {en_ordinal(day.lstrip('0'))}, {en_year(year)}"


@rules.rule(r"(?<![\w.])['’]?((?:1[0-9]|20)?)(\d0)['’]?s(?![\w])")
def _decade(m: re.Match[str]) -> str:
    tens = en_integer(m[2]) if m[2] != "00" else "hundred"
    said = tens[:-1] + "ies" if tens.endswith("y") else tens + "s"
    if m[1] == "20" and m[2] == "00":
        return "two thousands"
    return f"{en_integer(m[1])} {said}" if m[1] else said


@rules.rule(rf"(?<![\w.,$-])((?:19|20)\d\d){DASH}((?:19|20)\d\d|\d\d)(?![\w-]|\.\d)")
def _years(m: re.Match[str]) -> str:
    return f"{en_year(m[1])} to {en_year(m[2])}"


_IS_YEAR = re.compile(r"1[1-9]\d\d|20\d\d")
_COUNTS = re.compile(r"\s(?:[a-z]+s|people)\b")
_YEAR_BEFORE = re.compile(
    r"(?:\b(?:in|since|by|from|until|till|before|after|during|of|year|circa|early|late|mid|and|summer|winter|spring|fall"
    r"|autumn|copyright)\s|[(©])$",
    re.IGNORECASE,
)


_CLOCK = r"([01]?\d|2[0-4]):([0-5]\d)(?::([0-5]\d))?"
_HALF = r"(?:\s?([aApP])\.?[mM](?:\.(?=\s[a-z]|,)|(?![\w.])|\.))"


def _clock(hour: str, minute: str, second: str | None, half: str | None) -> str:
    said = en_integer(str(int(hour)))
    if int(minute):
        said += f" oh {en_integer(minute[1])}" if minute[0] == "0" else f" {en_integer(minute)}"
    elif second:
        said += " oh oh"
    elif not half:
        said += " o'clock"
    if second:
        said += f" and {_count(str(int(second)), 'second')}"
    return said + (f" {half.upper()}M" if half else "")


@rules.rule(rf"(?<![\w.:]){_CLOCK}{_HALF}?(?:{DASH}{_CLOCK}{_HALF}?)?(?![\w:])")
def _time(m: re.Match[str]) -> str:
    said = _clock(m[1], m[2], m[3], m[4])
    return said + (" to " + _clock(m[5], m[6], m[7], m[8]) if m[5] else "")


@rules.rule(rf"(?<![\w.:])(\d{{1,2}})(?:{DASH}(\d{{1,2}}))?{_HALF}")
def _hour(m: re.Match[str]) -> str:
    return f"{en_integer(m[1])}{f' to {en_integer(m[2])}' if m[2] else ''} {m[3].upper()}M"


# --- Numbers that are names


@rules.rule(
    r"(?<![\w-])(\+\d{1,3}[- ])?(?:\((\d{3})\)\s?|(\d{3})[-. ])(\d{3,4})[-. ](\d{4})(?:-(\d{1,5}))?(?![\w-]|\.\d)"
)
def _telephone(m: re.Match[str]) -> str:
    country = "plus " + en_digits(m[1].strip("+- ")) + ", " if m[1] else ""
    return country + ", ".join(en_digits(part) for part in (m[2] or m[3], m[4], m[5], m[6]) if part)


@rules.rule(r"(?<![\w-])\+\d{1,3}(?:[- ]?\d{2,5}){2,5}(?![\w-]|\.\d)|(?<![\w-])1-8\d\d-\d{3}-\d{4}(?![\w-])")
def _foreign_telephone(m: re.Match[str]) -> str:
    parts = re.split(r"[- ]", m[0].lstrip("+"))
    return ("plus " if m[0][0] == "+" else "") + ", ".join(map(en_digits, parts))


_NUMBERED = re.compile(
    r"\b(?:order|account|card|code|pin|otp|passcode|password|tracking|ticket|invoice|zip|id|serial|case|reference|ref"
    r"|extension|ext|flight|room|dial|call|text|ending in|digits)(?:\s(?:number|no\.?|code|id|is))*[\s:#]{1,3}$",
    re.IGNORECASE,
)


# --- Versions, money, percent


@rules.rule(VERSION)
def _version(m: re.Match[str]) -> str:
    digits = m[0].lstrip("vVer. ")
    letter = "v " if digits != m[0] else ""
    first, *rest = digits.split(".")
    if not letter and len(rest) == 3:
        return " dot ".join(map(en_digits, (first, *rest)))
    return letter + " point ".join(map(en_integer, (first, *rest)))


@rules.rule(
    rf"(?<![A-Za-z0-9])([-−])?({_MONEY})\s?({NUMBER})(?:{DASH}(?:{_MONEY})?({NUMBER}))?"
    rf"(?:\s?(thousand|million|billion|trillion|mn|bn|tn|[kKmMbBtT])(?![A-Za-z]))?"
)
def _money(m: re.Match[str]) -> str:
    unit, _ = CURRENCIES[m[2]]
    minus = "minus " if m[1] else ""
    scale = SCALES.get(m[5] or "", m[5] or "")
    first = _money_number(m[3]) + (f" {scale}" if scale else "")
    if m[4]:
        return f"{minus}{_money_number(m[3])} to {_money_number(m[4])}{f' {scale}' if scale else ''} {_moneys(unit)}"
    if scale:
        return f"{minus}{first} {_moneys(unit)}"
    return minus + _amount(m[3], *CURRENCIES[m[2]])


def _money_number(number: str) -> str:
    return en_number(number.removesuffix(".00"))


def _moneys(unit: str) -> str:
    return MONEY_PLURALS.get(unit, unit + "s")


def _amount(number: str, unit: str, part: str) -> str:
    whole, _, fraction = number.replace(",", "").partition(".")
    if not part or len(fraction) != 2:
        stripped = number.rstrip("0").rstrip(".") if fraction else number
        return f"{en_number(stripped)} {unit if stripped == '1' else _moneys(unit)}"
    said = []
    if whole != "0":
        said.append(f"{en_integer(whole)} {unit if whole == '1' else _moneys(unit)}")
    if fraction != "00":
        said.append(f"{en_integer(str(int(fraction)))} {part if fraction == '01' else _moneys(part)}")
    return " and ".join(said) or f"zero {_moneys(unit)}"


@rules.rule(rf"{_FREE}({NUMBER})\s?(USD|EUR|GBP|CNY|RMB|JPY)(?![A-Za-z])")
def _money_after(m: re.Match[str]) -> str:
    return _amount(m[1], *CURRENCIES[m[2]])


@rules.rule(rf"({_SIGN}{NUMBER})\s?%?{DASH}([-−+]?{NUMBER})\s?%")
def _percents(m: re.Match[str]) -> str:
    return f"{en_number(m[1])} to {en_number(m[2])} percent"


@rules.rule(rf"({_SIGN}{NUMBER})\s?([%‰])")
def _percent(m: re.Match[str]) -> str:
    return f"{en_number(m[1])} {NAMES[m[2]]}"


# --- Large, small, and quantities


@rules.rule(rf"({_SIGN}{NUMBER})[eE]([-−+]?)(\d{{1,3}})(?![\w.])")
def _scientific(m: re.Match[str]) -> str:
    minus = "minus " if m[2] in ("-", "−") else ""
    return f"{en_number(m[1])} times ten to the {minus}{en_integer(m[3])}"


@rules.rule(r"(?<![\w.])(\d+|[A-Za-z])\^([-−]?)(\d{1,3})(?!\d)")
def _power(m: re.Match[str]) -> str:
    base = en_integer(m[1]) if m[1].isdecimal() else m[1]
    if m[3] in ("2", "3") and not m[2]:
        return f"{base} {'squared' if m[3] == '2' else 'cubed'}"
    return f"{base} to the {'minus ' if m[2] else ''}{en_integer(m[3])}"


@rules.rule(rf"({_SIGN}{NUMBER})\s?(?:{_UNIT}\s?)?{DASH}({NUMBER})\s?({_UNIT})(?![\w²³])")
def _quantities(m: re.Match[str]) -> str:
    return f"{en_number(m[1])} to {_quantity(m[2], m[3])}"


@rules.rule(rf"(?<![\w.])({_SIGN}{NUMBER})\s?({_either(UNITS)})/({_either(PER)})(?!\w)")
def _rate(m: re.Match[str]) -> str:
    return f"{_quantity(m[1], m[2])} per {PER[m[3]]}"


@rules.rule(rf"(?<![\w.])({_SIGN}(?:{NUMBER}|\.\d++))[\s-]?({_UNIT})(?![\w²³]|[-/]\w)(?!(?<=\ss)\s[a-z])")
def _measure(m: re.Match[str]) -> str:
    return _quantity(m[1], m[2])


@rules.rule(rf"(?:(?<=thousand )|(?<=million )|(?<=billion )){_UNIT}(?![\w²³/])")
def _unit_of_many(m: re.Match[str]) -> str:
    return _plural(UNITS[m[0]]) if m[0] in UNITS else m[0]


@rules.rule(rf"(?<![\w.-])({NUMBER})-(?=[a-z]{{3}})")
def _compound(m: re.Match[str]) -> str:
    return en_number(m[1]) + " "


@rules.rule(rf"(?<![\w.])({_SIGN}(?:{NUMBER}|\.\d++))\s?(k|K|M|bn|B)(?!\w)(?!(?<=4K|8K|2K))")
def _thousands(m: re.Match[str]) -> str:
    return f"{en_number(m[1])} {SCALES[m[2]]}"


@rules.rule(rf"(?<![\w.-])({NUMBER}){DASH}({NUMBER})(?!\s?=|-\d|\w|\.\d)")
def _range(m: re.Match[str]) -> str:
    return f"{en_number(m[1])} to {en_number(m[2])}"


# --- Fractions, ratios, ordinals


@rules.rule(r"(?<![\w.])([4-8])['′](\d{1,2})(?:\"|″)?(?!\w)")
def _height(m: re.Match[str]) -> str:
    return f"{en_integer(m[1])} foot {en_integer(m[2])}"


@rules.rule(r"(?<![\w./])(24/7|9/11)(?![\w/])")
def _fixed(m: re.Match[str]) -> str:
    return {"24/7": "twenty four seven", "9/11": "nine eleven"}[m[0]]


@rules.rule(rf"(?<![\w./])(?:(\d{{1,4}})\s)?(\d{{1,4}})/(\d{{1,4}})(?![\w/]|\.\d)(?:\s?({_UNIT})(?![\w²³]))?")
def _fraction(m: re.Match[str]) -> str:
    unit = " " + (_plural(UNITS[m[4]]) if m[4] in UNITS else m[4]) if m[4] else ""
    return _broken(m) + unit


def _broken(m: re.Match[str]) -> str:
    whole = f"{en_integer(m[1])} and " if m[1] else ""
    if whole and m[2] == "1" and m[3] in ("2", "4"):
        return whole + ("a half" if m[3] == "2" else "a quarter")
    if len(m[3]) > 2 or m[3] in ("0", "1") or m[3][0] == "0":
        return f"{whole}{en_integer(m[2])} over {en_integer(m[3])}"
    part = {"2": "half", "4": "quarter"}.get(m[3]) or en_ordinal(m[3])
    plural = {"half": "halves"}.get(part, part + "s")
    return f"{whole}{en_integer(m[2])} {part if m[2] == '1' else plural}"


@rules.rule(rf"(?<![\w:.])({NUMBER}):({NUMBER})(?![\w:])")
def _ratio(m: re.Match[str]) -> str:
    return f"{en_number(m[1])} to {en_number(m[2])}"


@rules.rule(r"(?<![\w.,])(\d{1,3}(?:,\d{3})++|\d{1,9})(?:st|nd|rd|th)(?!\w)")
def _ordinal(m: re.Match[str]) -> str:
    return en_ordinal(m[1].replace(",", ""))


# --- Words with digits in them


@rules.rule(r"(?<!\w)(?:B2B|B2C|C2C|O2O|P2P|M2M|D2C)(?!\w)")
def _to(m: re.Match[str]) -> str:
    return f"{m[0][0]} to {m[0][2]}"


@rules.rule(r"(?<!\w)(?:Nos?\.?\s?|№\s?)(?=\d)|(?<![\w#])#(?=\d)")
def _number_sign(_: re.Match[str]) -> str:
    return "number "


@rules.rule(r"(?<![\w#&])#(?=[^\W\d])")
def _hashtag(_: re.Match[str]) -> str:
    return "hashtag "


@rules.rule(r"[Ⅰ-Ⅿⅰ-ⅿ]+|(?<![\w.])[IVXL]+(?![\w.]|['’])|(?<![\w.])[IVXL]+(?=\.(?:\s|$))")
def _roman(m: re.Match[str]) -> str:
    letters = unicodedata.normalize("NFKC", m[0])
    before = m.string[max(0, m.start() - 14) : m.start()].split()
    value = roman(letters)
    if not value or (not m.string[: m.start()].endswith(" ") and m[0] == letters):
        return m[0]
    word = before[-1] if before else ""
    if word in _REGNAL:
        return f"the {en_ordinal(value)}"
    if m[0] != letters or word in _COUNTED or (len(letters) > 1 and word[:1].isupper() and word.isalpha()):
        return en_integer(value)
    return m[0]


_COUNTED = frozenset(
    [
        "Chapter",
        "Section",
        "Article",
        "Volume",
        "Part",
        "Type",
        "Phase",
        "Stage",
        "Class",
        "Level",
        "Grade",
        "Book",
        "Act",
        "Vol",
        "War",
        "Bowl",
        "Appendix",
        "Title",
        "Figure",
        "Table",
        "Scene",
        "Division",
        "Category",
        "Step",
        "chapter",
        "section",
        "part",
        "type",
        "phase",
        "stage",
        "level",
        "grade",
        "class",
        "figure",
        "table",
    ]
)
_REGNAL = frozenset(
    [
        "Henry",
        "Louis",
        "George",
        "Edward",
        "Elizabeth",
        "James",
        "Philip",
        "Pius",
        "Paul",
        "Charles",
        "William",
        "Richard",
        "Francis",
        "Alexander",
        "Nicholas",
        "Frederick",
        "Leopold",
        "Catherine",
        "Mary",
        "Gregory",
        "Benedict",
        "Clement",
        "Innocent",
        "Urban",
        "Leo",
    ]
)


@rules.rule(r"(?<!\w)(?:\d+(?:\.\d+)?[A-Za-z]|[A-Za-z]+-?\d)[A-Za-z0-9]*+(?:[-.][A-Za-z]*\d+[A-Za-z]*+)*+")
def _code(m: re.Match[str]) -> str:
    """A word of letters and digits."""
    if known := fallback.measure(m[0], "en"):
        return known
    said = []
    parts = re.findall(r"\d+|[A-Za-z]+|\.(?=\d)", m[0])
    for at, part in enumerate(parts):
        if part == ".":
            said.append("point")
        elif part.isdecimal():
            said.append(_in_code(part, after_point=at > 0 and parts[at - 1] == "."))
        else:
            said.append(part)
    return " ".join(said)


def _in_code(digits: str, *, after_point: bool) -> str:
    if after_point or digits[0] == "0":
        return en_digits(digits)
    if len(digits) == 4 and digits[2:] != "00":
        return f"{en_integer(digits[:2])} {en_integer(digits[2:]) if digits[2] != '0' else en_digits(digits[2:])}"
    return en_integer(digits) if len(digits) < 3 or digits.endswith("00") else en_digits(digits)


# --- Numbers without anything


@rules.rule(r"(?<![\w.,$€£-])\d{3,}(?![\w%°]|[.,:]\d|-\d)")
def _long(m: re.Match[str]) -> str:
    before = m.string[max(0, m.start() - 32) : m.start()]
    if _NUMBERED.search(before) or (len(m[0]) > 8 and not m[0].endswith("000")):
        return en_digits(m[0])
    if _IS_YEAR.fullmatch(m[0]) and _YEAR_BEFORE.search(before) and not _COUNTS.match(m.string, m.end()):
        return en_year(m[0])
    return en_integer(m[0])


# --- What is left of numbers and symbols


@rules.rule(rf"{_SIGN}(?:{NUMBER}|(?<![\d.])\.\d++)")
def _number(m: re.Match[str]) -> str:
    said = en_number(m[0])
    # A word and a number that touch are two words.
    before = " " if m.string[m.start() - 1 : m.start()].isalnum() and m.start() else ""
    after = " " if m.string[m.end() : m.end() + 1].isalnum() else ""
    return before + said + after


@rules.rule(r"(?<=[0-9A-Za-z])\+\+(?![\w+])")
def _plus_plus(_: re.Match[str]) -> str:
    return " plus plus"


@rules.rule(r"(?<=\w)\+(?!\s?[\w+])")
def _plus(_: re.Match[str]) -> str:
    return " plus"


@rules.rule(
    r"(?<=[\w)%\s])(?:[<>!=]=|[+×÷=≥≤≈≠→]|[<>](?=\s?\d)|(?<=\s)[<>](?=\s)|[-−](?=\d+\s?=)|(?<=\d\s)[x*](?=\s\d)|(?<=\d)[x*](?=\d)|(?<=\d\s)[-−](?=\s\d))(?=\s?[\w\(\-−$.])"
)
def _operator(m: re.Match[str]) -> str:
    return f" {OPERATORS[m[0]]} "


@rules.rule(r"[<>≥≤≈~](?=\s?[\d$.])")
def _compared(m: re.Match[str]) -> str:
    return f" {OPERATORS.get(m[0], 'about')} "


@rules.rule(r"(?<=[A-Za-z)])[²³]")
def _squared(m: re.Match[str]) -> str:
    return " squared" if m[0] == "²" else " cubed"


@rules.rule(r"[-=]>")
def _arrow(_: re.Match[str]) -> str:
    return " "


@rules.rule(r"[&@%‰°±$¥￥€£№]")
def _named(m: re.Match[str]) -> str:
    return f" {NAMES[m[0]]} "


@rules.rule(r"(?<![A-Za-z])[CF]#(?!\w)")
def _sharp(m: re.Match[str]) -> str:
    return m[0][0] + " sharp"


@rules.rule(FILE_OR_MEMBER)
def _member(m: re.Match[str]) -> str:
    if m[0].count(".") * 2 + 1 == len(m[0]):  # initials
        return m[0]
    return m[0].replace(".", " dot ").replace("_", " ")


@rules.rule(r"[_`*|^\\~#=<>+→/−]+")
def _silent(_: re.Match[str]) -> str:
    return " "
