"""Words and sentence frames of the messy-text grammar. Data only: messy_text.py says what is done with them.

In a frame {name}, {city}, {adj}, {noun}, {verb}, {things}, {label} and {digit} are words that stay as they are; the other slots
are written messily and become normal.
"""

# ruff: noqa: SIM905  (word lists read better as text)

FIRST_NAMES = """
Ada Alan Amira Anna Ben Bruno Carla Chen Clara Daniel David Diego Elena Emma Erik Eva Fatima Felix Finn Grace Hana Hugo Ines
Ivan Jack Jana Jonas Julia Kai Karim Laura Leo Lena Lin Lucas Maria Marta Max Mia Milan Nina Noah Nora Olga Omar Oscar Paul
Petra Priya Rosa Ruth Sam Sara Sofia Tariq Theo Tom Vera Yuki Zoe
""".split()

SYLLABLES = """
al an ar bel ber bor car cor dal dan del den dor el en er fal fen gar gel han hel kar ken lam len lor mar mel min mon mor nel
nor ol or pel per ral ren ros sal san sel sten tal tel ten tor val ven ver wal wen wil win
""".split()
NAME_ENDS = "berg by dale er ford ham ic ini ley man mann man ner ova sen ski son ston ton well wood".split()

CITIES = """
Amsterdam Athens Berlin Boston Bristol Cairo Chicago Cologne Denver Dublin Geneva Hamburg Helsinki Kyoto Leeds Lisbon London
Lyon Madrid Milan Munich Nairobi Oslo Paris Porto Prague Rome Seattle Seoul Sofia Tokyo Toronto Turin Vienna Warsaw Zurich
""".split()

STREETS = """
Oak Maple Cedar Pine Elm Park Lake River Hill Church Mill Station Garden Market Castle Bridge Forest Meadow Spring Sunset
Harbour Queen King Abbey Chapel Orchard Willow Rose Valley Victoria Windsor Highland Franklin Lincoln
""".split()

ADJECTIVES = """
big blue bright broken careful cheap clean cold dark early empty fast final first fresh friendly full green heavy large late
light little local long lost loud narrow new next nice old open plain quick quiet red round second sharp short simple small
soft strong tall third tired warm wet white wide yellow young
""".split()

NOUNS = """
answer apple artist baker bell bicycle boat book bottle box bridge camera car carpet cat chair child clock cloud coat coffee
cook copy corner cup dinner doctor dog door driver engine farmer field fire flower friend garden guest guitar hammer house
invoice kettle key kitchen ladder lamp letter library machine manager map meeting mirror morning mountain neighbour note
office package page painter paper party pencil phone piano picture plan plate printer question report ribbon road roof room
school shelf ship shop song station story street student table teacher ticket train tree umbrella visitor wall window winter
worker
""".split()

VERBS = """
answers brings breaks builds carries checks cleans closes covers draws drops fills finds fixes follows forgets hears helps
holds keeps leaves likes loses makes misses moves needs opens paints plans pulls pushes reads remembers repairs sells sends
shows starts stops takes turns visits wants washes watches writes
""".split()

COUNTED = """
apples bags batteries books bottles boxes bricks cables candles cards chairs copies cups desks doors eggs envelopes flowers
forks glasses guests keys ladders lamps letters mugs nails notebooks oranges packages pages parcels pencils photos pillows
plants plates potatoes roses shirts shoes spoons stamps stickers tables tickets tiles towels trees visitors windows
""".split()

LABELS = ("room", "gate", "platform", "chapter", "bus", "tram", "seat", "table", "floor", "line", "page", "exit")

FRAMES = """
meet me on {date} at {time}
see you at {time} on {date}
the train to {city} leaves at {time} from platform {digit}
the flight lands in {city} at {time} on {date}
it costs {amount}
the ticket to {city} is {amount}
I paid {amount} for {count} {things}
we need {count} {things} before {date}
please order {count} {things} and {count} {things}
call me at {phone}
my new number is {phone}
you can reach {name} at {phone} until {time}
text {phone} when you are in {city}
I moved to {address}
send the {noun} to {address}
{name} lives at {address} in {city}
pick up the {adj} {noun} at {address} after {time}
the {noun} weighs {weight}
it is {distance} from here to {city}
walk {distance} and turn left at the {adj} {noun}
add {volume} of water and {weight} of flour
the {noun} is {length} long and {length} wide
the meeting on {date} was moved to {time}
the {adj} {noun} arrives on {date}
the invoice of {date} over {amount} is still open
rent is {amount} and due on {date}
the deposit of {amount} was paid on {date}
{name} was born on {date} in {city}
the contract runs from {date} to {date}
we are open from {time} to {time}
the shop at {address} closes at {time}
lunch is at {time} and dinner at {time}
{name} sold {count} {things} for {amount}
the budget went from {amount} to {amount}
the bill was {amount} and the tip {amount}
the {noun} uses {energy} per day
the battery of the {noun} is at {share}
prices in {city} rose by {share} since {date}
drive at {speed} for {duration}
the tank holds {volume} and the box {count} {things}
{share} of the {things} were sold by {time}
{count} {things} and {count} {things} are in the {noun}
ask {name} about the {adj} {noun}
the {adj} {noun} {verb} the {noun}
{name} {verb} the {adj} {noun}
the {noun} in {city} {verb} the {adj} {noun}
{name} and {name} are in {label} {digit}
take {label} {digit} to {city}
my {noun} is in {label} {digit}
maybe the {noun} {verb} a {noun}
there are {count} {things} in {label} {digit}
the deadline is {date} at {time}
the concert starts at {time} and tickets are {amount}
{name} may call {phone} on {date}
fax it to {phone} or bring it to {address}
deliver {count} {things} to {address} by {date}
the {noun} was sold for {amount} on {date}
the temperature in {city} was {temperature} at {time}
the parcel of {weight} leaves {city} on {date}
boil the {things} for {duration}
heat the {noun} to {temperature} for {duration}
{name} ran {distance} in {duration}
the old {noun} at {address} costs {amount}
for {amount} you get {count} {things}
""".strip().splitlines()

OPENERS = (
    "hi {name}, ",
    "hello {name}, ",
    "dear {name}, ",
    "ok, ",
    "please note: ",
    "by the way, ",
    "good news, ",
    "sorry, ",
    "{name}, ",
    "remember, ",
)
JOINS = (", and ", ", but ", "; ", ". ", ", so ", " because ", " and ", " - ")
CLOSERS = (", thanks", ", see you", ", best {name}", " please", ", ok", " as agreed", ", all right", " for {name}")
