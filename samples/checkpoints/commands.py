"""The speech sample's language: what people say to a kitchen clock. Numbers, times, dates and commands, all in words.

The split hashes each sentence, so it is the same on every machine and does not move when templates are added.
"""

import hashlib
import random
import re
from collections.abc import Callable

HELD_OUT_PERCENT = 5

LISTS = {
    "ones": "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|"
    "eighteen|nineteen",
    "tens": "-|-|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety",
    "ordinal": "first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|thirteenth|fourteenth|"
    "fifteenth|sixteenth|seventeenth|eighteenth|nineteenth|twentieth",
    "month": "january|february|march|april|may|june|july|august|september|october|november|december",
    "room": "kitchen|bedroom|bathroom|hallway|garage|living room|dining room|office|garden|cellar",
    "device": "lights|lamp|fan|heater|radio|television|speakers|camera|oven|kettle",
    "switch": "on|off",
    "unit": "seconds|minutes|hours",
    "day": "monday|tuesday|wednesday|thursday|friday|saturday|sunday|today|tomorrow|tonight|the weekend",
    "city": "london|paris|berlin|madrid|rome|oslo|vienna|lisbon|chicago|boston|toronto|sydney|tokyo|cairo|dublin|athens",
    "name": "anna|ben|clara|daniel|emma|frank|grace|henry|julia|kevin|laura|martin|nora|oliver|peter|rachel|simon|victoria",
    "item": "milk|bread|butter|eggs|apples|bananas|coffee|tea|sugar|flour|cheese|onions|potatoes|rice|chicken|soap|candles",
    "measure": "litres|kilos|bottles|boxes|bags|packets",
    "task": "call the dentist|water the plants|feed the cat|take out the rubbish|check the oven|pay the electricity bill|"
    "walk the dog|close the windows|send the report|pick up the children|charge the phone|lock the front door",
    "music": "some jazz|classical music|the morning news|my favourite songs|the next track|rock music|the blues|a podcast",
    "sign": "plus|minus|times|divided by",
    "part": "morning|afternoon|evening",
    "please": "please |could you |can you |",
}

WORDS = {name: words.split("|") for name, words in LISTS.items()}
ONES, TENS, ORDINALS = WORDS["ones"], WORDS["tens"], WORDS["ordinal"]

TEMPLATES = """
{please}set a timer for {small} {unit}
{please}set a timer for {small} minutes and {small} seconds
{please}set an alarm for {time}
wake me up at {time} on {day}
cancel the alarm at {time}
remind me to {task} at {time}
remind me in {small} minutes to {task}
{please}turn {switch} the {room} {device}
{please}turn the {room} {device} {switch}
turn {switch} the {device} in the {room} at {time}
dim the {room} lights to {percent} percent
set the {room} temperature to {small} degrees
{please}play {music} in the {room}
turn the volume up to {small}
what is {number} {sign} {small}
what is {small} {sign} {small}
how many {unit} are there in {small} {unit}
what is the weather in {city} on {day}
will it rain in {city} {day}
how long does it take from {city} to {city}
call {name}
call {name} at {digits}
send a message to {name} and say that i will be there at {time}
add {small} {measure} of {item} to the shopping list
add {item} and {item} to the shopping list
remove {item} from the shopping list
meet {name} in {city} on {date}
book a table for {small} people at {time}
the train to {city} leaves at {time} from platform {small}
the number is {digits}
the code is {digits}
the total is {number}
it is {time}
{number}
{number}
{digits}
{time}
{date}
{date} {year}
""".strip().splitlines()

Slot = Callable[[random.Random], str]


def spell(number: int) -> str:
    """An integer of 0 … 999,999 in words, as Americans say it."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (f" {ONES[number % 10]}" if number % 10 else "")
    size, word = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = f" {spell(number % size)}" if number % size else ""
    return f"{spell(number // size)} {word}{rest}"


def _time(rng: random.Random) -> str:
    hour = ONES[rng.randint(1, 12)]
    minute = rng.randint(0, 59)
    past = {0: f"{hour} o'clock", 15: f"a quarter past {hour}", 30: f"half past {hour}", 45: f"a quarter to {hour}"}
    exact = f"{hour} {spell(minute)}" if minute > 9 else f"{hour} oh {ONES[max(minute, 1)]}"
    words = rng.choice([past.get(minute, exact), exact, past[rng.choice([0, 15, 30, 45])]])
    return words + rng.choice(["", "", " in the morning", " in the evening"])


def _date(rng: random.Random) -> str:
    day = rng.randint(1, 31)
    ordinal = ORDINALS[day - 1] if day <= 20 else f"twenty {ORDINALS[day - 21]}" if day < 30 else "thirtieth"
    ordinal = "thirty first" if day == 31 else ordinal
    return f"the {ordinal} of {rng.choice(WORDS['month'])}"


def _year(rng: random.Random) -> str:
    century = rng.choice(["nineteen", "twenty", "eighteen"])
    return f"{century} {spell(rng.randint(10, 99))}"


def _number(rng: random.Random) -> str:
    return spell(rng.randrange(10 ** rng.randint(2, 6)))


SLOTS: dict[str, Slot] = {
    "small": lambda rng: spell(rng.choice([rng.randint(2, 20), rng.randint(2, 99)])),
    "percent": lambda rng: spell(5 * rng.randint(1, 19)),
    "number": _number,
    "digits": lambda rng: " ".join(ONES[rng.randint(0, 9)] for _ in range(rng.randint(4, 8))),
    "time": _time,
    "date": _date,
    "year": _year,
}


def _fill(slot: str, rng: random.Random) -> str:
    return SLOTS[slot](rng) if slot in SLOTS else rng.choice(WORDS[slot])


def sentence(rng: random.Random) -> str:
    """One sentence in lower case without punctuation."""
    return re.sub(r"{(\w+)}", lambda slot: _fill(slot[1], rng), rng.choice(TEMPLATES))


def is_held_out(text: str) -> bool:
    """True for about one sentence in twenty, chosen by its hash."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def sentences(count: int, held_out: bool, seed: int) -> list[str]:
    """`count` different sentences of one side of the split."""
    rng, found = random.Random(seed), dict[str, None]()
    while len(found) < count:
        text = sentence(rng)
        if is_held_out(text) == held_out:
            found[text] = None
    return list(found)
