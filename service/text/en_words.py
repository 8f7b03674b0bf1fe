"""The words in which English says units, money, symbols and abbreviations."""

from __future__ import annotations

UNITS = {
    "kg": "kilogram", "g": "gram", "mg": "milligram", "km": "kilometer", "m": "meter", "cm": "centimeter",
    "mm": "millimeter", "μm": "micrometer", "um": "micrometer", "nm": "nanometer", "m²": "square meter",
    "m2": "square meter", "km²": "square kilometer", "km2": "square kilometer", "m³": "cubic meter",
    "m3": "cubic meter", "L": "liter", "l": "liter", "ml": "milliliter", "mL": "milliliter", "s": "second",
    "sec": "second", "secs": "second", "ms": "millisecond", "μs": "microsecond", "us": "microsecond",
    "ns": "nanosecond", "min": "minute", "mins": "minute", "h": "hour", "hr": "hour", "hrs": "hour", "yr": "year",
    "yrs": "year", "kgs": "kilogram", "mo": "month", "mos": "month", "wk": "week", "wks": "week",
    "Hz": "hertz", "kHz": "kilohertz", "KHz": "kilohertz",
    "MHz": "megahertz", "GHz": "gigahertz", "W": "watt", "kW": "kilowatt", "KW": "kilowatt", "MW": "megawatt",
    "kWh": "kilowatt hour", "V": "volt", "kV": "kilovolt", "mV": "millivolt", "mA": "milliamp",
    "mAh": "milliamp hour", "dB": "decibel", "Pa": "pascal", "hPa": "hectopascal", "kPa": "kilopascal",
    "px": "pixel", "KB": "kilobyte", "kB": "kilobyte", "MB": "megabyte", "GB": "gigabyte", "TB": "terabyte",
    "PB": "petabyte", "KiB": "kibibyte", "MiB": "mebibyte", "GiB": "gibibyte", "ft": "foot", "lb": "pound",
    "lbs": "pound", "oz": "ounce", "mi": "mile", "kcal": "kilocalorie", "mph": "mile per hour", "°": "degree",
    "℃": "degree Celsius", "°C": "degree Celsius", "℉": "degree Fahrenheit", "°F": "degree Fahrenheit", "ha": "hectare",
}  # fmt: skip
PER_SECOND = {
    "bps": "bit", "kbps": "kilobit", "Kbps": "kilobit", "Mbps": "megabit", "mbps": "megabit", "Gbps": "gigabit",
    "fps": "frame",
}  # fmt: skip
PER = {"s": "second", "sec": "second", "h": "hour", "hr": "hour", "min": "minute", "d": "day", "kg": "kilogram",
        "day": "day", "month": "month", "year": "year", "L": "liter"}  # fmt: skip
PLURALS = {"foot": "feet", "mile per hour": "miles per hour"}
CURRENCIES = {
    "$": ("dollar", "cent"), "US$": ("US dollar", "cent"), "USD": ("US dollar", "cent"), "€": ("euro", "cent"),
    "EUR": ("euro", "cent"), "£": ("pound", "penny"), "GBP": ("pound", "penny"), "¥": ("yuan", ""),
    "￥": ("yuan", ""), "CNY": ("yuan", ""), "RMB": ("yuan", ""), "JPY": ("yen", ""), "₹": ("rupee", "paisa"),
    "HK$": ("Hong Kong dollar", "cent"), "A$": ("Australian dollar", "cent"), "C$": ("Canadian dollar", "cent"),
    "₩": ("won", ""), "₽": ("ruble", ""),
}  # fmt: skip
MONEY_PLURALS = {"yuan": "yuan", "yen": "yen", "won": "won", "penny": "pence", "paisa": "paise"}
SCALES = {
    "k": "thousand", "K": "thousand", "m": "million", "M": "million", "mn": "million", "b": "billion",
    "B": "billion", "bn": "billion", "t": "trillion", "T": "trillion", "tn": "trillion",
}  # fmt: skip
SYMBOLS_IN_NAMES = {
    ".": "dot", "/": "slash", ":": "colon", "@": "at", "-": "dash", "_": "underscore", "?": "question mark",
    "=": "equals", "&": "ampersand", "#": "hash", "%": "percent", "+": "plus", "~": "tilde", "{": "", "}": "",
}  # fmt: skip
OPERATORS = {
    "+": "plus", "-": "minus", "−": "minus", "×": "times", "x": "times", "*": "times", "÷": "divided by",
    "=": "equals", "==": "equals", ">": "greater than", "<": "less than", "≥": "greater than or equal to",
    ">=": "greater than or equal to", "≤": "less than or equal to", "<=": "less than or equal to",
    "≈": "approximately equals", "≠": "does not equal", "!=": "does not equal", "→": "to",
}  # fmt: skip
NAMES = {
    "&": "and", "@": "at", "%": "percent", "‰": "per mille", "°": "degrees", "±": "plus or minus", "$": "dollars",
    "¥": "yuan", "￥": "yuan", "€": "euros", "£": "pounds", "№": "number",
}  # fmt: skip
ABBREVIATIONS = {
    "Mr.": "Mister", "Mrs.": "Missus", "Ms.": "Miss", "Dr.": "Doctor", "Prof.": "Professor", "Gen.": "General",
    "Capt.": "Captain", "Lt.": "Lieutenant", "Col.": "Colonel", "Sgt.": "Sergeant", "Sen.": "Senator",
    "Rep.": "Representative", "Gov.": "Governor", "Rev.": "Reverend", "Jr.": "Junior", "Sr.": "Senior",
    "vs.": "versus", "e.g.": "for example", "i.e.": "that is", "etc.": "et cetera", "approx.": "approximately",
    "Inc.": "Incorporated", "Ltd.": "Limited", "Corp.": "Corporation", "Co.": "Company", "Ave.": "Avenue",
    "Blvd.": "Boulevard", "Rd.": "Road", "dept.": "department", "Dept.": "Department", "est.": "established",
    "w/o": "without", "w/": "with ", "a.k.a.": "also known as", "Mt.": "Mount",
    "Fig.": "Figure", "Figs.": "Figures", "fig.": "figure", "Vol.": "Volume", "vol.": "volume", "pp.": "pages",
    "Sec.": "Section", "Ch.": "Chapter", "Eq.": "Equation",
}  # fmt: skip
STOPS = frozenset(("etc.", "Inc.", "Ltd.", "Corp.", "Co.", "Jr.", "Sr.", "Ave.", "Blvd.", "Rd."))
"""Those that may end a sentence, whose full stop is then the sentence's."""
MONTHS = {
    name: full
    for full in [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ]
    for name in (full, full[:3], "Sept" if full == "September" else full[:3])
}
DAYS = {
    name: full
    for full in ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    for name in (full, full[:3], full[:4] if full[0] == "T" else full[:3])
}
