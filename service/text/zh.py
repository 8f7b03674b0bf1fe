"""How Chinese says what is written in digits, letters and symbols."""

from __future__ import annotations

import re
import unicodedata

from service.text import fallback
from service.text.numbers import roman, zh_digits, zh_integer, zh_number, zh_telephone
from service.text.rules import DASH, EMAIL, FILE_OR_MEMBER, NUMBER, URL, VERSION, Rules
from service.text.zh_words import BYTES, CURRENCIES, LIANG, NAMES, OPERATORS, SCALES, SYMBOLS_IN_NAMES, UNITS

rules = Rules(r"²³～0-9A-Za-z#¥￥$€£₩₽₹฿+\-−±.&@=<>≤≥≈≠×÷→*/_~№Ⅰ-Ⅿⅰ-ⅿ^%‰°|()\\`")


def _either(words: object) -> str:
    assert isinstance(words, (dict, tuple))
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


_UNIT = rf"(?:{_either(UNITS)})(?![A-Za-z²³]|(?<!s)[0-9])"
_BYTE = rf"(?:{_either(BYTES)})(?![A-Za-z])"
_MONEY = rf"(?:{_either(CURRENCIES)})"
_SCALE = r"(?:[万亿千百]+|[kKwWMB](?![A-Za-z]))"
_FREE = r"(?<![A-Za-z0-9_.])"
"""Not inside a word or a number."""
_SIGN = r"(?:(?<![A-Za-z0-9)）%°])[-−+±])?"
_WORD = r"(?<![A-Za-z0-9])"


def _name(text: str) -> str:
    """An address, a path: every symbol said."""
    return "".join(SYMBOLS_IN_NAMES.get(char, char) for char in zh_digits(text))


def _plain(number: str) -> str:
    """A number, the zeros after its fraction's last digit left out."""
    whole, point, fraction = number.partition(".")
    return zh_number(whole + (point + fraction.rstrip("0") if fraction.strip("0") else ""))


def _scaled(number: str, scale: str) -> str:
    """`120`, `k` → 十二万; `3.5`, `万` → 三点五万."""
    if scale not in SCALES:
        return (zh_number(number, liang=True) if scale else zh_number(number)) + scale
    whole, _, fraction = number.replace(",", "").partition(".")
    power = SCALES[scale]
    if len(fraction) > power:
        return zh_number(number) + scale
    return zh_integer((whole + fraction.ljust(power, "0")).lstrip("0") or "0")


def _quantity(number: str, unit: str) -> str:
    said = UNITS.get(unit)
    if said is None:
        return zh_number(number) + unit
    return zh_number(number, liang=said not in ("度", "摄氏度", "华氏度")) + said


# --- Addresses


@rules.rule(EMAIL)
def _email(m: re.Match[str]) -> str:
    return _name(m[0])


@rules.rule(URL)
def _url(m: re.Match[str]) -> str:
    return _name(m[0])


@rules.rule(r"(?<![\w/.])/[A-Za-z_{][\w{}-]*+(?:/[\w{}.-]++)*+")
def _path(m: re.Match[str]) -> str:
    return _name(m[0].replace("_", " "))


# --- Numbers that are names: said digit by digit


@rules.rule(r"(?<!\d)(\+?86)?[- ]?(1[3-9]\d)[- ]?(\d{4})[- ]?(\d{4})(?![\d.])")
def _mobile(m: re.Match[str]) -> str:
    return ("加八六" if m[1] and m[1][0] == "+" else "八六" if m[1] else "") + zh_telephone(m[2] + m[3] + m[4])


@rules.rule(
    r"(?<![\d-])(?:\(0\d{2,3}\)\s?|0\d{2,3}-)\d{3,4}[ -]?\d{4}(?![\d-])|(?<![\d-])[48]00-?\d{3}-?\d{4}(?![\d-])"
)
def _landline(m: re.Match[str]) -> str:
    return zh_telephone(re.sub(r"\D", "", m[0]))


@rules.rule(r"(?<![\w-])\+\d{1,3}[- ]\d{1,4}(?:[- ]\d{2,4}){1,3}(?![\d-])|(?<![\d-])\d{3}-\d{3,4}-\d{4}(?![\d-])")
def _foreign_telephone(m: re.Match[str]) -> str:
    return ("加" if m[0][0] == "+" else "") + zh_telephone(re.sub(r"\D", "", m[0]))


_NUMBERED = (
    "电话|手机|热线|号码|编号|订单号?|单号|卡号|账号|帐号|工号|尾号|验证码|邮编|QQ群?|微信号?|密码|学号|身份证号?|车牌号?"
    "|房间号?|航班号?|批次号?|流水号|口令|分机|工单号?|证号"
)


@rules.rule(r"(?<!\d)\d{3,}(?=热线|客服|报警)")
def _hotline(m: re.Match[str]) -> str:
    return zh_telephone(m[0])


@rules.rule(r"(?<![\w.,])\d{9,}(?![\d.,]|\s?(?:元|美元|人|万|亿|次|个|%))(?<!0000)")
def _long(m: re.Match[str]) -> str:
    return zh_telephone(m[0])


# --- Dates and times


_MONTH = r"0?[1-9]|1[0-2]"
_DAY = r"0?[1-9]|[12]\d|3[01]"


@rules.rule(
    rf"(?<!\d)(\d{{4}})(?:-({_MONTH})-({_DAY})|/({_MONTH})/({_DAY})|[.·]({_MONTH})[.·]({_DAY}))"
    r"(?![\d.])(?:[T ](?=\d\d?:))?"
)
def _date(m: re.Match[str]) -> str:
    month, day = (m[2] or m[4] or m[6]).lstrip("0"), (m[3] or m[5] or m[7]).lstrip("0")
    return f"{zh_digits(m[1])}年{zh_integer(month)}月{zh_integer(day)}日"


@rules.rule(r"(?<!\d)0([1-9])(?=\s?[月日号])")
def _padded(m: re.Match[str]) -> str:
    return zh_integer(m[1])


@rules.rule(r"(?<![\d/-])((?:19|20)\d\d)[-/](0[1-9]|1[0-2])(?![\d/-])")
def _month(m: re.Match[str]) -> str:
    return f"{zh_digits(m[1])}年{zh_integer(m[2].lstrip('0'))}月"


@rules.rule(rf"(?<!\d)(\d{{4}}){DASH}(\d{{4}}|\d{{2}})(?=\s?(?:年|学年|赛季|财年))")
def _years(m: re.Match[str]) -> str:
    return f"{zh_digits(m[1])}到{zh_digits(m[2])}"


@rules.rule(
    r"(?<![\d.])(\d{4}|0\d|[7-9]\d|\d\d(?=年\d{1,2}月))(?=\s?年(?!前|后|内|间|来|多|以|代))|(?<![\d.])\d{4}(?=年(?!代))"
)
def _year(m: re.Match[str]) -> str:
    return zh_digits(m[0])


@rules.rule(r"(?:(?<=公元前)|(?<=公元))\d+(?=年)")
def _era(m: re.Match[str]) -> str:
    return zh_digits(m[0])


@rules.rule(r"(?<!\d)(\d{2})?(\d0)(?=\s?年代|\s?世纪)")
def _decade(m: re.Match[str]) -> str:
    return zh_digits(m[0]) if m[1] else zh_integer(m[2])


@rules.rule(r"(?<![\d.])(?:[5-9][05]|00)(?=后(?![天年来面]))")
def _generation(m: re.Match[str]) -> str:
    return zh_digits(m[0])


_CLOCK = r"([01]?\d|2[0-4])[:：]([0-5]\d)(?:[:：]([0-5]\d))?"


def _clock(hour: str, minute: str, second: str | None) -> str:
    said = zh_integer(str(int(hour)), liang=True) + "点"
    if int(minute) or second:
        said += zh_integer(minute) + "分"
    return said + (f"{zh_integer(second)}秒" if second else "")


@rules.rule(
    rf"(?<![\d:比分])(?<!比分是)(?<!比例)(?<!以){_CLOCK}(?:{DASH}{_CLOCK})?(?![\d:])(?:\s?([aApP])\.?[mM]\b\.?)?"
)
def _time(m: re.Match[str]) -> str:
    half = {"a": "上午", "p": "下午"}.get((m[7] or "").lower(), "")
    said = half + _clock(m[1], m[2], m[3])
    return said + ("到" + _clock(m[4], m[5], m[6]) if m[4] else "")


@rules.rule(r"(?<![\w.:])(\d{1,2})\s?([aApP])\.?[mM]\b\.?")
def _hour(m: re.Match[str]) -> str:
    return ("上午" if m[2] in "aA" else "下午") + zh_integer(m[1], liang=True) + "点"


# --- Versions, addresses of machines


@rules.rule(VERSION)
def _version(m: re.Match[str]) -> str:
    digits = m[0].lstrip("vVer. ")
    letter = m[0][: len(m[0]) - len(digits)]
    first, *rest = digits.split(".")
    address = not letter and len(rest) == 3
    return letter + "点".join([zh_digits(first) if address else zh_integer(first), *map(zh_digits, rest)])


# --- Money


@rules.rule(
    rf"{_WORD}([-−])?({_MONEY})\s?({NUMBER})(?:(?:{DASH}|[到至])(?:{_MONEY})?({NUMBER}))?(\s?(?:{_SCALE}|million|billion))?(元)?"
)
def _money(m: re.Match[str]) -> str:
    scale = {"million": "M", "billion": "B"}.get((m[5] or "").strip(), (m[5] or "").strip())
    first, last = (number and (_scaled(number, scale) if scale else _plain(number)) for number in (m[3], m[4]))
    return ("负" if m[1] else "") + (f"{first}到{last}" if last else first) + CURRENCIES[m[2]]


@rules.rule(rf"{_FREE}({NUMBER})\s?({_SCALE})?\s?(RMB|USD|EUR|CNY|HKD|JPY|GBP)(?![A-Za-z])")
def _money_after(m: re.Match[str]) -> str:
    return _scaled(m[1], m[2] or "") + CURRENCIES[m[3]]


# --- Percent


_PERCENT = {"%": "百分之", "‰": "千分之", "‱": "万分之"}


@rules.rule(rf"({_SIGN})({NUMBER})(?:\s?[%‰])?\s?[-~～–—到至]\s?([-−+]?)({NUMBER})\s?([%‰])")
def _percents(m: re.Match[str]) -> str:
    of = _PERCENT[m[5]]
    return f"{_signed(m[1])}{of}{zh_number(m[2])}到{_signed(m[3])}{of}{zh_number(m[4])}"


@rules.rule(rf"({_SIGN})({NUMBER})\s?([%‰‱])")
def _percent(m: re.Match[str]) -> str:
    return _signed(m[1]) + _PERCENT[m[3]] + zh_number(m[2])


def _signed(sign: str) -> str:
    return {"-": "负", "−": "负", "+": "正", "±": "正负"}.get(sign, "")


# --- Large and small


@rules.rule(rf"{_SIGN}({NUMBER})[eE]([-+−]?)(\d{{1,3}})(?![\w.])")
def _scientific(m: re.Match[str]) -> str:
    sign = m[0][: m.start(1) - m.start()]
    return f"{_signed(sign)}{zh_number(m[1])}乘以十的{'负' if m[2] in ('-', '−') else ''}{zh_integer(m[3])}次方"


@rules.rule(r"(?<![\w.])(\d+|[A-Za-z])\^([-−]?)(\d{1,3})(?!\d)")
def _power(m: re.Match[str]) -> str:
    base = zh_integer(m[1]) if m[1].isdecimal() else m[1]
    if m[3] in ("2", "3") and not m[2]:
        return base + {"2": "的平方", "3": "的立方"}[m[3]]
    return f"{base}的{'负' if m[2] else ''}{zh_integer(m[3])}次方"


# --- Ranges, rates, quantities


@rules.rule(
    rf"{_SIGN}({NUMBER})\s?({_UNIT}|{_BYTE})?{DASH}([-−]?{NUMBER})\s?(℃|°C|{_UNIT}|{_BYTE})(?:/(s|h|min|d)(?![A-Za-z]))?"
)
def _quantities(m: re.Match[str]) -> str:
    sign = m[0][: m.start(1) - m.start()]
    unit = m[2] or m[4]
    first = _quantity(sign + m[1], unit) if m[2] else zh_number(sign + m[1])
    return _per(m[5]) + first + "到" + _quantity(m[3], m[4])


@rules.rule(
    rf"{_SIGN}({NUMBER})\s?({_either(UNITS)}|{_either(BYTES)})/(s|sec|h|min|d|天|小时|秒|分钟|月|年)(?![A-Za-z])"
)
def _rate(m: re.Match[str]) -> str:
    sign = m[0][: m.start(1) - m.start()]
    return _per(m[3]) + _quantity(sign + m[1], m[2])


@rules.rule(rf"({NUMBER})(元|次|人|个|美元|字|条|篇|件|公里|米)/(天|小时|秒|分钟|月|年|人|次|周|个|吨|平方米|公斤)")
def _rate_in_words(m: re.Match[str]) -> str:
    return f"每{m[3]}{zh_number(m[1], liang=True)}{m[2]}"


def _per(unit: str | None) -> str:
    names = {"s": "秒", "sec": "秒", "h": "小时", "min": "分钟", "d": "天"}
    return f"每{names.get(unit, unit)}" if unit else ""


@rules.rule(rf"(?<![A-Za-z0-9.-])({NUMBER}){DASH}({NUMBER})(?!\s?=|-\d|[\d.]\d)(?:\s?([kKwW])(?![A-Za-z]))?")
def _range(m: re.Match[str]) -> str:
    before = m.string[max(0, m.start() - 3) : m.start()]
    joint = "比" if re.search(r"比分|以\s?$", before) else "到"
    if m[3]:
        return f"{_scaled(m[1], m[3])}{joint}{_scaled(m[2], m[3])}"
    return zh_number(m[1]) + joint + _number_before(m[2], m.string[m.end() : m.end() + 2])


@rules.rule(r"(?<![A-Za-z0-9])(\d{1,3})[Cc](\d{1,4})[Gg](?![A-Za-z0-9])")
def _machine(m: re.Match[str]) -> str:
    return f"{zh_integer(m[1])}核{zh_integer(m[2])}G"


@rules.rule(rf"{_FREE}{_SIGN}({NUMBER})\s?({_UNIT})")
def _measure(m: re.Match[str]) -> str:
    return _quantity(m[0][: m.end(1) - m.start()].replace(" ", ""), m[2])


@rules.rule(rf"{_FREE}({NUMBER})\s?({_BYTE})")
def _bytes(m: re.Match[str]) -> str:
    return zh_number(m[1]) + m[2]


@rules.rule(
    rf"{_FREE}({NUMBER})\s?(?:([kKwW])(?![A-Za-z0-9])(?!\s?(?:视频|屏|分辨率|电视|显示|画质|超清|高清|蓝光|金))|([MB])(?=\+|\s?(?:用户|人|次|条|美元)))"
)
def _thousands(m: re.Match[str]) -> str:
    return _scaled(m[1], m[2] or m[3])


# --- Fractions and ratios


@rules.rule(r"(?<![\w./])24/7(?![\w/])")
def _always(_: re.Match[str]) -> str:
    return "二十四七"


@rules.rule(rf"(?<![\w./])(?:(\d{{1,4}})\s)?(\d{{1,4}})/(\d{{1,4}})(?![\d/]|\.\d)(?:\s?({_UNIT}))?")
def _fraction(m: re.Match[str]) -> str:
    whole = zh_integer(m[1]) + "又" if m[1] else ""
    return f"{whole}{zh_integer(m[3])}分之{zh_integer(m[2])}{UNITS[m[4]] if m[4] else ''}"


@rules.rule(rf"(?<![\d:])({NUMBER})\s?[:：]\s?({NUMBER})(?![\d:])")
def _ratio(m: re.Match[str]) -> str:
    return f"{zh_number(m[1])}比{zh_number(m[2])}"


# --- Words with digits in them


@rules.rule(r"(?<![A-Za-z0-9])(?:B2B|B2C|C2C|O2O|P2P|M2M|G2B|D2C)(?![A-Za-z0-9])")
def _to(m: re.Match[str]) -> str:
    return f"{m[0][0]} to {m[0][2]}"


@rules.rule(r"(?<![A-Za-z0-9])[PpTt](?:50|75|90|95|99|999|9999)(?![A-Za-z0-9])")
def _percentile(m: re.Match[str]) -> str:
    return m[0][0] + zh_digits(m[0][1:])


@rules.rule(r"(?<![A-Za-z0-9])(?:[Nn][Oo]\.?\s?|№\s?)(\d{1,4})(?![\w.])")
def _number_one(m: re.Match[str]) -> str:
    return "第" + zh_integer(m[1])


@rules.rule(r"(?<![A-Za-z0-9_])(?:\d+(?:\.\d+)?[A-Za-z]|[A-Za-z]+-?\d)[A-Za-z0-9]*+(?:[-.][A-Za-z]*\d+[A-Za-z]*+)*+")
def _code(m: re.Match[str]) -> str:
    """A word of letters and digits."""
    if known := fallback.measure(m[0], "zh"):
        return known
    text = m[0]
    joined = re.sub(r"(?<=[A-Za-z])-(?=\d)", " ", text)
    said = re.sub(r"(?<=\d)\.(?=\d)", "点", joined)
    return re.sub(r"\d+", _in_code, said)


def _in_code(digits: re.Match[str]) -> str:
    after_point = digits.string[digits.start() - 1 : digits.start()] == "点"
    return zh_digits(digits[0]) if len(digits[0]) > 2 or after_point else zh_integer(digits[0])


@rules.rule(
    r"[Ⅰ-Ⅿⅰ-ⅿ]+|(?<=第)[IVXL]+(?=[章节部卷条款届代期级季集])|(?<=[\u4e00-\u9fff])(?:II|III|IV|VI|VII|VIII|IX|XI|XII|XIII|XIV|XV|XVI)(?![A-Za-z0-9])"
)
def _roman(m: re.Match[str]) -> str:
    value = roman(unicodedata.normalize("NFKC", m[0]))
    return zh_integer(value) if value else m[0]


@rules.rule(r"(?<=RTX )\d{4}|(?<=GTX )\d{3,4}|(?<=Boeing )7\d7|(?<=波音)7\d7|(?<=骁龙)\d{3}|(?<=麒麟)\d{3,4}")
def _model(m: re.Match[str]) -> str:
    return zh_digits(m[0])


# --- What is left of numbers


@rules.rule(r"(?<![^\s•·*-])(\d{1,2})\.(?=\s)")
def _item(m: re.Match[str]) -> str:
    return zh_integer(m[1]) + "、"


@rules.rule(rf"{_SIGN}(?:{NUMBER}|(?<![\d.])\.\d++)")
def _number(m: re.Match[str]) -> str:
    before = m.string[max(0, m.start() - 4) : m.start()]
    digits = m[0]
    after = m.string[m.end() : m.end() + 3].lstrip()[:2]
    if digits.isdecimal() and len(digits) > 2 and _is_name(m.string, m.start()):
        return zh_telephone(digits)
    if before.endswith("第"):
        return zh_number(digits)
    return _number_before(digits, after)


_IS_NAME = re.compile(rf"(?:{_NUMBERED}|拨打|致电|拨通|呼叫)(?:\s?[是为:：#]|是：|\s)?\s?$")


def _is_name(text: str, at: int) -> bool:
    return _IS_NAME.search(text[max(0, at - 8) : at]) is not None


def _number_before(number: str, after: str) -> str:
    return zh_number(
        number,
        liang=bool(after)
        and (after[0] in LIANG or after == "分钟" or (after[0] == "点" and not after[1:].isdecimal())),
    )


# --- Symbols


@rules.rule(r"(?<=[0-9A-Za-z])\+\+(?![\w+])")
def _plus_plus(_: re.Match[str]) -> str:
    return "加加"


@rules.rule(r"(?<=\d)\+(?!\s?[\d+])|(?<=\d[kKwWM])\+(?!\s?[\d+])")
def _and_more(_: re.Match[str]) -> str:
    return "以上"


@rules.rule(
    r"(?<=[\w)）%\s°²³\u4e00-\u9fff])(?:[<>!=]=|[+×÷=≥≤≈≠→]|[<>](?=\s?\d)|(?<=\s)[<>](?=\s)|(?<=\d)\s?[x*](?=\s?\d)|[-−](?=\d+\s?=)|(?<=\s)[-−](?=\s\d))(?=\s?[\w\(（\-−$¥\u4e00-\u9fff])"
)
def _operator(m: re.Match[str]) -> str:
    return OPERATORS[m[0].strip()]


@rules.rule(r"[<>≥≤≈~～](?=\s?[\d$¥.])")
def _compared(m: re.Match[str]) -> str:
    return OPERATORS.get(m[0], "约")


@rules.rule(r"(?<=[A-Za-z)）])[²³]")
def _squared(m: re.Match[str]) -> str:
    return "的平方" if m[0] == "²" else "的立方"


@rules.rule(r"[-=]>")
def _arrow(_: re.Match[str]) -> str:
    return " "


@rules.rule(r"[&@%‰°±$¥￥€£№]")
def _named(m: re.Match[str]) -> str:
    return NAMES[m[0]]


@rules.rule(r"(?<![\w#])#(?=\d)")
def _number_sign(_: re.Match[str]) -> str:
    return "井号"


@rules.rule(r"(?<![\w#&])#(?=[A-Za-z_\u4e00-\u9fff])")
def _hashtag(_: re.Match[str]) -> str:
    return "话题"


@rules.rule(r"(?<![A-Za-z])[CF]#(?!\w)")
def _sharp(m: re.Match[str]) -> str:
    return m[0][0] + " sharp"


@rules.rule(FILE_OR_MEMBER)
def _member(m: re.Match[str]) -> str:
    return m[0].replace(".", "点").replace("_", " ")


@rules.rule(r"[_`*|^\\~#=<>+→/−]+")
def _silent(_: re.Match[str]) -> str:
    return " "
