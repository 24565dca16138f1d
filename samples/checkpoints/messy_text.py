"""Messy dates, times, numbers, amounts, units, phone numbers and addresses inside sentences, and their normal form.

Every sentence has one right answer, by these rules:

1. Dates become YYYY-MM-DD. In digits the day comes first (3/4/24 is 2024-04-03). Two-digit years up to 49 are 20xx.
2. Times become HH:MM in 24 hours. 12 am is 00:00, 12 pm is 12:00; noon is 12:00, midnight 00:00.
3. Numbers lose their thousands separators and get a decimal point: a separator before exactly three last digits separates
   thousands (1.200 is 1200), one before one or two last digits is the decimal separator (1,5 is 1.5). Words become digits.
4. Amounts have two decimals and the currency's code behind: 1200.50 EUR. Bucks are USD, quid and £ are GBP.
5. Measures are a number and the unit's symbol: 90 km/h, 2.5 h, 20 °C, 50 %.
6. Phone numbers become E.164: + and digits. Without a country prefix they are North American (+1); 00 is +; (0) is dropped.
7. Addresses are written out and capitalised: 12 n oak st., apt 4 is 12 North Oak Street, Apartment 4.
8. Everything else stays as it is, digits that name something (room 12, gate 7) included.
9. A dot at the very end closes the sentence, behind an abbreviation too: "at 5 p.m." is "at 17:00."
"""

# ruff: noqa: SIM905  (word lists read better as text)

import hashlib
import random
from collections.abc import Callable
from functools import partial

from messy_words import (
    ADJECTIVES,
    CITIES,
    CLOSERS,
    COUNTED,
    FIRST_NAMES,
    FRAMES,
    JOINS,
    LABELS,
    NAME_ENDS,
    NOUNS,
    OPENERS,
    STREETS,
    SYLLABLES,
    VERBS,
)

Random = random.Random
Pair = tuple[str, str]  # messy, normal
HELD_OUT_SHARE = 32  # one target in so many is never trained on

ONES = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen
""".split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
MONTHS = "January February March April May June July August September October November December".split()
SHORT_MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
DAYS_IN = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
MINUTE_WORDS = {5: "five", 10: "ten", 15: "quarter", 20: "twenty", 25: "twenty-five", 30: "half"}
CURRENCIES = {
    "EUR": ("€", ("euro", "euros", "EUR", "eur")),
    "USD": ("$", ("dollars", "USD", "usd", "bucks")),
    "GBP": ("£", ("GBP", "gbp", "quid", "pounds sterling")),
    "CHF": ("CHF ", ("francs", "CHF", "chf", "Swiss francs")),
}
CENTS = {"EUR": "euros", "USD": "dollars"}  # of which people say the cents
UNITS = {
    "km": ("km", "kilometres", "kilometers", "kms", "klicks"),
    "m": ("m", "metres", "meters"),
    "cm": ("cm", "centimetres", "centimeters"),
    "kg": ("kg", "kilos", "kilograms", "kgs"),
    "g": ("g", "grams", "grammes"),
    "l": ("l", "litres", "liters", "ltr"),
    "ml": ("ml", "millilitres", "milliliters"),
    "°C": ("°C", "degrees", "degrees celsius", "deg C", "° C"),
    "km/h": ("km/h", "kmh", "kph", "kilometres per hour", "kilometers an hour"),
    "min": ("min", "minutes", "mins"),
    "h": ("h", "hours", "hrs"),
    "%": ("%", "percent", "per cent", "pct"),
    "mi": ("mi", "miles"),
    "lb": ("lb", "lbs"),
    "kWh": ("kWh", "kwh", "kilowatt hours"),
}
QUANTITIES = {
    "distance": ("km", "m", "mi"),
    "length": ("cm", "m"),
    "weight": ("kg", "g", "lb"),
    "volume": ("l", "ml"),
    "speed": ("km/h",),
    "duration": ("h", "min"),
    "temperature": ("°C",),
    "energy": ("kWh",),
    "share": ("%",),
}
HALVES = {"l": "litre", "km": "kilometre", "h": "hour", "kg": "kilo", "mi": "mile"}
STREET_TYPES = {
    "Street": ("st", "st.", "str.", "street"),
    "Avenue": ("ave", "ave.", "av.", "avenue"),
    "Road": ("rd", "rd.", "road"),
    "Boulevard": ("blvd", "blvd.", "boulevard"),
    "Lane": ("ln", "ln.", "lane"),
    "Drive": ("dr", "dr.", "drive"),
    "Court": ("ct", "ct.", "court"),
    "Square": ("sq", "sq.", "square"),
    "Place": ("pl", "pl.", "place"),
}
DIRECTIONS = {
    "North": ("n", "n.", "north"),
    "South": ("s", "s.", "south"),
    "East": ("e", "e.", "east"),
    "West": ("w", "w.", "west"),
}
ROOMS = {"Apartment": ("apt", "apt.", "apartment", "#"), "Suite": ("ste", "ste.", "suite"), "Floor": ("fl", "fl.", "floor")}
COUNTRY_CODES = "44 49 33 39 34 41 43 31 32 45 46 47 48 61 81".split()


def below_hundred(number: int, rng: Random) -> str:
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (rng.choice("- ") + ONES[ones] if ones else "")


def in_words(number: int, rng: Random) -> str:
    """Below a million."""
    if number >= 1000:
        thousands, rest = divmod(number, 1000)
        head = in_words(thousands, rng) + " thousand"
        return head + (joint(rest, rng) + in_words(rest, rng) if rest else "")
    if number >= 100:
        hundreds, rest = divmod(number, 100)
        head = rng.choice((ONES[hundreds], ONES[hundreds], "a")) if hundreds == 1 else ONES[hundreds]
        return head + " hundred" + (rng.choice((" ", " and ")) + below_hundred(rest, rng) if rest else "")
    return below_hundred(number, rng)


def joint(rest: int, rng: Random) -> str:
    return rng.choice((" ", " and ")) if rest < 100 else " "


def grouped(number: int, separator: str) -> str:
    """Digits in threes; four-digit numbers may be left alone by the caller."""
    return f"{number:,}".replace(",", separator)


def cased(text: str, rng: Random) -> str:
    """As it is, lower or upper: people write all three."""
    kind = rng.random()
    return text if kind < 0.5 else text.lower() if kind < 0.92 else text.upper()


def ordinal(day: int) -> str:
    ending = "th" if 10 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


def messy_year(year: int, rng: Random) -> str:
    century, rest = divmod(year, 100)
    kind = rng.random()
    if kind < 0.55:
        return str(year)
    if kind < 0.7:
        return f"{rest:02d}"
    if kind < 0.8:
        return f"'{rest:02d}"
    if rest >= 10:
        return f"{below_hundred(century, rng)} {below_hundred(rest, rng) if kind < 0.93 else rest}"
    return f"two thousand{rng.choice((' ', ' and '))}{ONES[rest]}" if century == 20 and rest else str(year)


def date(rng: Random) -> Pair:
    year, month = rng.randint(1950, 2049), rng.randint(1, 12)
    day = rng.randint(1, DAYS_IN[month - 1])
    normal = f"{year}-{month:02d}-{day:02d}"
    kind = rng.random()
    if kind < 0.05:
        return normal, normal
    if kind < 0.4:
        mark = rng.choice("./-")
        short = rng.random() < 0.4
        d, m = (f"{day:02d}", f"{month:02d}") if rng.random() < 0.4 else (str(day), str(month))
        return f"{d}{mark}{m}{mark}{year % 100:02d}" if short else f"{d}{mark}{m}{mark}{year}", normal
    name = cased(rng.choice((MONTHS, MONTHS, SHORT_MONTHS))[month - 1], rng)
    written = messy_year(year, rng)
    number = rng.choice((str(day), ordinal(day)))
    forms = (f"the {ordinal(day)} of {name} {written}", f"{number} {name} {written}", f"{name} {number}, {written}")
    return rng.choice(forms), normal


def clock_words(hour: int, minute: int, rng: Random) -> str:
    """Half past, quarter to and so on; hour 1 to 11 of its half of the day, also after 'to'."""
    late = minute > 30
    shown = (hour + late) % 12
    part = MINUTE_WORDS[60 - minute if late else minute]
    if part not in ("half", "quarter") and rng.random() < 0.4:
        part = str(60 - minute if late else minute)
    spoken = ONES[shown] if rng.random() < 0.6 else str(shown)
    return f"{part} {'to' if late else 'past'} {spoken} {period(hour, rng)}"


def period(hour: int, rng: Random) -> str:
    forms = ["pm", "p.m.", "PM"] if hour >= 12 else ["am", "a.m.", "AM"]
    if 1 <= hour < 12:
        forms.append("in the morning")
    if 13 <= hour < 18:
        forms.append("in the afternoon")
    if 18 <= hour < 23:
        forms.append("in the evening")
    return rng.choice(forms)


def time(rng: Random) -> Pair:
    hour, minute = rng.randint(0, 23), rng.choice((0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, rng.randint(0, 59)))
    normal = f"{hour:02d}:{minute:02d}"
    spoken = minute % 5 == 0 and minute and hour % 12 and (hour + (minute > 30)) % 12
    if normal in ("12:00", "00:00") and rng.random() < 0.7:
        return ("noon" if hour else "midnight"), normal
    if spoken and rng.random() < 0.5:
        return clock_words(hour, minute, rng), normal
    shown, sign = hour % 12 or 12, period(hour, rng)
    if minute == 0 and rng.random() < 0.5:
        number = rng.choice((str(shown), ONES[shown]))
        return rng.choice((f"{number} {sign}", f"{number} o'clock {sign}")), normal
    gap = " " if " " in sign else rng.choice((" ", "", " "))
    pressed = f"{shown}:{minute:02d}{gap}{sign}"
    forms = (pressed, f"{hour}.{minute:02d} h", f"{hour}h{minute:02d}", f"{hour:02d}{minute:02d} hours", normal)
    return rng.choices(forms, (5, 2, 2, 1, 1))[0], normal


def whole(number: int, rng: Random) -> str:
    """A whole number in digits or words."""
    kind = rng.random()
    if kind < 0.35 and (number < 1000 or number % 100 == 0):
        return in_words(number, rng)
    if number >= 1000 and kind < 0.8:
        return grouped(number, rng.choice((",", ".", " ", "'")))
    if number >= 1000 and number % 1000 == 0 and kind < 0.9:
        return f"{number // 1000}{rng.choice('kK')}"
    return str(number)


def any_whole(rng: Random) -> int:
    """Mostly small, some round, some large."""
    kind = rng.random()
    if kind < 0.5:
        return rng.randint(2, 99)
    if kind < 0.75:
        return rng.randint(100, 999)
    if kind < 0.9:
        return rng.randint(10, 99) * 100
    return rng.randint(1000, 99999)


def count(rng: Random) -> Pair:
    if rng.random() < 0.1:
        dozens = rng.randint(1, 6)
        return ("a" if dozens == 1 else ONES[dozens]) + " dozen", str(12 * dozens)
    number = any_whole(rng)
    return whole(number, rng), str(number)


def amount(rng: Random) -> Pair:
    code = rng.choice(tuple(CURRENCIES))
    symbol, names = CURRENCIES[code]
    units, cents = any_whole(rng), rng.choice((0, 0, 50, 99, rng.randint(1, 99)))
    normal = f"{units}.{cents:02d} {code}"
    if cents == 0:
        written = whole(units, rng)
        in_digits = written[0].isdigit()
        return (f"{symbol}{written}" if in_digits and rng.random() < 0.35 else f"{written} {rng.choice(names)}"), normal
    if code in CENTS and rng.random() < 0.2 and cents > 1:
        and_cents = f"{rng.choice(('', 'and '))}{rng.choice((str(cents), in_words(cents, rng)))} cents"
        return f"{whole(units, rng)} {CENTS[code]} {and_cents}", normal
    separator, point = rng.choice(((".", ","), (",", "."), ("", "."), ("", ","), (" ", ",")))
    written = f"{grouped(units, separator)}{point}{cents:02d}"
    forms = (
        f"{symbol}{written}",
        f"{symbol.strip()} {written}",
        f"{written} {symbol.strip()}",
        f"{written} {rng.choice(names)}",
    )
    return rng.choice(forms), normal


def measure(quantity: str, rng: Random) -> Pair:
    """Hours have one decimal at most and three digits at most: 10.45 h and 1045 hours are times."""
    symbol = rng.choice(QUANTITIES[quantity])
    kind = rng.random()
    if symbol in HALVES and kind < 0.2:
        return halves(symbol, rng)
    name = rng.choice(UNITS[symbol])
    gap = "" if name == symbol and rng.random() < 0.5 else " "
    if kind < 0.5:
        number, tenths, hundredths = rng.randint(0, 120), rng.randint(0, 9), rng.randint(1, 9)
        fraction = f"{hundredths}" if symbol == "h" or rng.random() < 0.5 else f"{tenths}{hundredths}"
        return f"{number}{rng.choice(',.')}{fraction}{gap}{name}", f"{number}.{fraction} {symbol}"
    number = rng.randint(2, 240) if quantity in ("temperature", "share", "speed", "duration") else any_whole(rng)
    written = whole(number, rng)
    return f"{written}{gap if written[-1].isdigit() else ' '}{name}", f"{number} {symbol}"


def halves(symbol: str, rng: Random) -> Pair:
    if rng.random() < 0.35:
        return f"half {'an' if symbol == 'h' else 'a'} {HALVES[symbol]}", f"0.5 {symbol}"
    number = rng.randint(1, 12)
    spoken = rng.choice((f"{ONES[number]} and a half", f"{number} 1/2", f"{number} and a half"))
    return f"{spoken} {HALVES[symbol]}s", f"{number}.5 {symbol}"


def spoken_digits(digits: str, rng: Random) -> str:
    words = []
    i = 0
    while i < len(digits):
        word = rng.choice(("zero", "oh")) if digits[i] == "0" else ONES[int(digits[i])]
        twice = digits[i : i + 2] == 2 * digits[i] and rng.random() < 0.6
        words.append(f"double {word}" if twice else word)
        i += 1 + twice
    return " ".join(words)


def phone(rng: Random) -> Pair:
    if rng.random() < 0.5:
        area, exchange, line = f"{rng.randint(201, 989)}", f"{rng.randint(200, 999)}", f"{rng.randint(0, 9999):04d}"
        normal = f"+1{area}{exchange}{line}"
        if rng.random() < 0.2:
            return spoken_digits(area + exchange + line, rng), normal
        start = rng.choice(("", "", "", "1-", "+1 ", "1 ", "001 "))
        mark = rng.choice("-. ")
        return start + rng.choice((f"({area}) {exchange}{mark}{line}", f"{area}{mark}{exchange}{mark}{line}")), normal
    code = rng.choice(COUNTRY_CODES)
    area, local = str(rng.randint(20, 999)), "".join(rng.choice("0123456789") for _ in range(rng.randint(6, 7)))
    prefix = rng.choice((f"+{code}", f"00{code}", f"00 {code}", f"+{code} (0)"))
    mark = rng.choice(("-", " ", "/", " "))
    parts = rng.choice((local, f"{local[:3]} {local[3:]}", f"{local[:2]} {local[2:4]} {local[4:]}"))
    return f"{prefix}{'' if prefix[-1] == ')' else ' '}{area}{mark}{parts}", f"+{code}{area}{local}"


def address(rng: Random) -> Pair:
    number = str(rng.randint(1, 999)) + rng.choice(("", "", "", "", "a", "b"))
    name = rng.choice((rng.choice(STREETS), rng.choice(STREETS), invented(rng)))
    type_ = rng.choice(tuple(STREET_TYPES))
    messy, normal = [number], [number.upper()]
    if rng.random() < 0.2:
        direction = rng.choice(tuple(DIRECTIONS))
        messy.append(rng.choice(DIRECTIONS[direction]))
        normal.append(direction)
    written = cased(" ".join([*messy, name, capitalised(rng.choice(STREET_TYPES[type_]), rng)]), rng)
    full = " ".join([*normal, name, type_])
    if rng.random() < 0.3:
        room, which = rng.choice(tuple(ROOMS)), rng.randint(1, 30)
        short = capitalised(rng.choice(ROOMS[room]), rng)
        return f"{written}, {short}{'' if short == '#' else ' '}{which}", f"{full}, {room} {which}"
    return written, full


def capitalised(text: str, rng: Random) -> str:
    return text.capitalize() if rng.random() < 0.5 else text


def invented(rng: Random) -> str:
    """A name nobody has, so that copying must be learned rather than a list of names."""
    return ("".join(rng.choice(SYLLABLES) for _ in range(rng.choice((1, 1, 2)))) + rng.choice(NAME_ENDS)).capitalize()


def name(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(FIRST_NAMES)
    return f"{rng.choice(FIRST_NAMES)} {invented(rng)}" if kind < 0.7 else f"{rng.choice(('Mr', 'Mrs', 'Dr'))} {invented(rng)}"


MESSY: dict[str, Callable[[Random], Pair]] = {
    "date": date,
    "time": time,
    "amount": amount,
    "count": count,
    "phone": phone,
    "address": address,
    **{quantity: partial(measure, quantity) for quantity in QUANTITIES},
}
WORDS: dict[str, Callable[[Random], str]] = {
    "name": name,
    "city": lambda rng: rng.choice(CITIES),
    "adj": lambda rng: rng.choice(ADJECTIVES),
    "noun": lambda rng: rng.choice(NOUNS),
    "verb": lambda rng: rng.choice(VERBS),
    "things": lambda rng: rng.choice(COUNTED),
    "label": lambda rng: rng.choice(LABELS),
    "digit": lambda rng: f"{rng.randint(1, 99)}{rng.choice(('', '', '', 'A', 'b'))}",
}


def filled(frame: str, rng: Random) -> Pair:
    """The frame with its slots filled, messily and normally."""
    messy, normal = [], []
    for piece in frame.replace("{", "\0{").replace("}", "}\0").split("\0"):
        slot = piece[1:-1] if piece.startswith("{") else None
        if slot in MESSY:
            pair = MESSY[slot](rng)
        else:
            word = WORDS[slot](rng) if slot else piece
            pair = (word, word)
        messy.append(pair[0])
        normal.append(pair[1])
    return "".join(messy), "".join(normal)


def sentence(rng: Random) -> Pair:
    """One to three frames joined, perhaps with an opener and a closer, perhaps as a proper sentence."""
    parts = [rng.choice(OPENERS)] if rng.random() < 0.3 else []
    frames = rng.choices((1, 2, 3), (3, 5, 1))[0]
    for index in range(frames):
        parts += [rng.choice(JOINS)] if index else []
        parts.append(rng.choice(FRAMES))
    parts += [rng.choice(CLOSERS)] if rng.random() < 0.2 else []
    messy, normal = filled("".join(parts), rng)
    if rng.random() < 0.5 and parts[0][0].isalpha():  # a slot's first letter is the slot's affair
        messy, normal = messy[0].upper() + messy[1:], normal[0].upper() + normal[1:]
    if messy.endswith("."):  # an abbreviation's, which is the sentence's too
        return messy, normal + "."
    end = rng.choice(("", "", ".", ".", "!", "?"))
    return messy + end, normal + end


def is_held_out(normal: str) -> bool:
    """By the answer's hash: no answer of the held-out set was ever a training answer."""
    return int.from_bytes(hashlib.sha256(normal.encode()).digest()[:4], "big") % HELD_OUT_SHARE == 0


def pairs(seed: int, number: int, held_out: bool) -> list[Pair]:
    """`number` sentences of one side of the split, the same for the same seed."""
    rng = random.Random(seed)
    found: list[Pair] = []
    while len(found) < number:
        pair = sentence(rng)
        if is_held_out(pair[1]) == held_out:
            found.append(pair)
    return found


if __name__ == "__main__":
    for messy, normal in pairs(0, 30, held_out=False):
        print(messy, normal, sep="\n  ")
