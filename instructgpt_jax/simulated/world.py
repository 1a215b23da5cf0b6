"""The tiny world: its words, its facts, its events, and the web-like text that is written about it.

Everything here is a constant or a pure function of a `random.Random`, and only `Random.random()` is used, whose
stream is the same on every platform and in every Python version (`choice` and `shuffle` may change between versions).

Two kinds of statements, each with its own sentences, so that any text can be checked for what it claims:

* facts, in the present tense ("Mira lives in Oakford.", "The fox eats berries."): true or false in the whole world;
* events, in the past tense ("Mira went to Redhill."): true or false only with respect to a text that tells them.
"""

import hashlib
import random
import re
from collections.abc import Sequence

NAMES = tuple("Mira Tom Anna Ben Lena Sam Nora Leo Ida Max Rosa Finn".split())
PLACES = tuple("Oakford Redhill Lakeside Elmwood Fairview Northport Millbrook Sandbay".split())
ANIMALS = tuple("fox wolf hare cat dog bear horse duck mouse frog".split())
JOBS = tuple("baker farmer teacher doctor sailor painter singer guard".split())
FOODS = tuple("bread soup honey cheese fish cake nuts berries rice corn".split())
OBJECTS = tuple("lantern kite boat drum ladder basket mirror book clock key".split())
SETTINGS = tuple("forest river hill barn field lake".split())
COLOURS = tuple("red brown white black grey golden".split())
FEELINGS = tuple("sad tired afraid angry lonely bored".split())
ADJECTIVES = tuple("small old kind brave big young".split())
WEATHER = tuple("warm cold wet windy sunny dark".split())
GOOD = tuple("warm fresh tasty lovely".split())
BAD = tuple("cold burnt sour awful".split())
INSULTS = tuple("fool idiot liar pig".split())
RUDE = frozenset((*INSULTS, "stupid", "dumb", "ugly", "hate"))
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
WORDS_OF_NUMBER = {value: word for word, value in NUMBERS.items()}

CATEGORIES = {  # what a list can ask for
    "names": NAMES, "places": PLACES, "animals": ANIMALS, "jobs": JOBS, "foods": FOODS, "objects": OBJECTS,
    "colours": COLOURS,
}  # fmt: skip
# Words whose appearance out of nowhere is an invention in a closed-domain answer.
ENTITIES = frozenset(word.lower() for group in (NAMES, PLACES, ANIMALS, JOBS, FOODS, OBJECTS) for word in group)


def rng_of(*key: str | int) -> random.Random:
    """A generator that depends on `key` alone: the first 8 bytes of BLAKE2b over its parts."""
    text = "\x1f".join(map(str, key)).encode("utf-8", "surrogatepass")
    return random.Random(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big"))


def pick(rng: random.Random, items: Sequence):
    """One element of `items`, uniformly."""
    return items[int(rng.random() * len(items))]


def sample(rng: random.Random, items: Sequence, count: int) -> list:
    """`count` different elements of `items` in random order."""
    pool = list(items)
    return [pool.pop(int(rng.random() * len(pool))) for _ in range(count)]


def weighted(rng: random.Random, table: Sequence[tuple]):
    """The first field of one row of `table`, drawn with the weight in the row's second field."""
    point = rng.random() * sum(row[1] for row in table)
    for row in table:
        point -= row[1]
        if point < 0:
            return row[0]
    return table[-1][0]


# Facts ------------------------------------------------------------------------------------------------------------

# relation -> (sentence, question, the values it can take)
FACTS = {
    "home": ("{s} lives in {o}.", "Where does {s} live?", PLACES),
    "job": ("{s} is a {o}.", "What is the job of {s}?", JOBS),
    "pet": ("{s} has a {o}.", "Which animal does {s} have?", ANIMALS),
    "food": ("The {s} eats {o}.", "What does the {s} eat?", FOODS),
    "den": ("The {s} lives near the {o}.", "Where does the {s} live?", SETTINGS),
    "colour": ("The {s} is {o}.", "What colour is the {s}?", COLOURS),
    "famous": ("{s} is known for {o}.", "What is {s} known for?", FOODS),
}
RELATIONS_OF = {"name": ("home", "job", "pet"), "animal": ("food", "den", "colour"), "place": ("famous",)}


def _truth() -> dict[tuple[str, str], str]:
    rng = rng_of("world")
    truth = {}
    for kind, subjects in (("name", NAMES), ("animal", ANIMALS), ("place", PLACES)):
        for relation in RELATIONS_OF[kind]:
            values = FACTS[relation][2]
            # Every value is used about equally often, so that no constant answer is a good guess.
            deck = [value for _ in range(len(subjects) // len(values) + 1) for value in values]
            for subject in subjects:
                options = [value for value in deck if value != subject]
                truth[subject, relation] = pick(rng, options)
                deck.remove(truth[subject, relation])
    return truth


TRUTH = _truth()  # (subject, relation) -> object
_SUBJECTS = tuple(TRUTH)


def fact_sentence(subject: str, relation: str, value: str) -> str:
    return FACTS[relation][0].format(s=subject, o=value)


def other_value(rng: random.Random, values: Sequence[str], *not_these: str) -> str:
    return pick(rng, [value for value in values if value not in not_these])


def _fact(rng: random.Random, subject: str, relation: str, false: float) -> str:
    value = TRUTH[subject, relation]
    if rng.random() < false:
        value = other_value(rng, FACTS[relation][2], value, subject)
    return fact_sentence(subject, relation, value)


# Events -----------------------------------------------------------------------------------------------------------

# relation -> (past, present, question about the object, question about the person, values)
EVENTS = {
    "go": ("{s} went to {o}.", "{s} goes to {o}.", "Where did {s} go?", "Who went to {o}?", PLACES),
    "buy": ("{s} bought the {o}.", "{s} buys the {o}.", "What did {s} buy?", "Who bought the {o}?", OBJECTS),
    "see": ("{s} saw a {o}.", "{s} sees a {o}.", "What did {s} see?", "Who saw a {o}?", ANIMALS),
    "cook": ("{s} cooked some {o}.", "{s} cooks some {o}.", "What did {s} cook?", "Who cooked some {o}?", FOODS),
}
_VERBS = {"went to": "go", "bought the": "buy", "saw a": "see", "cooked some": "cook"}


def passage(rng: random.Random) -> list[tuple[str, str, str]]:
    """Three events of two people, as (subject, relation, object); no relation appears twice."""
    people = sample(rng, NAMES, 2)
    relations = sample(rng, tuple(EVENTS), 3)
    actors = [people[0], people[1], pick(rng, people)]
    return [(who, relation, pick(rng, EVENTS[relation][4])) for who, relation in zip(actors, relations, strict=True)]


def passage_text(events: Sequence[tuple[str, str, str]]) -> str:
    return " ".join(EVENTS[relation][0].format(s=subject, o=value) for subject, relation, value in events)


_CLAIM = re.compile(
    rf"\b(?P<who>{'|'.join(NAMES)}) (?:lives in (?P<home>{'|'.join(PLACES)})\b"
    rf"|is a (?P<job>{'|'.join(JOBS)})\b|has a (?P<pet>{'|'.join(ANIMALS)})\b)"
    rf"|\b[Tt]he (?P<beast>{'|'.join(ANIMALS)}) (?:eats (?P<food>{'|'.join(FOODS)})\b"
    rf"|lives near the (?P<den>{'|'.join(SETTINGS)})\b|is (?P<colour>{'|'.join(COLOURS)})\b)"
    rf"|\b(?P<town>{'|'.join(PLACES)}) is known for (?P<famous>{'|'.join(FOODS)})\b"
)
_EVENT_CLAIM = re.compile(rf"\b(?:(?P<who>{'|'.join(NAMES)}) |and )(?P<verb>{'|'.join(tuple(_VERBS))}) (?P<what>\w+)")


def fact_claims(text: str) -> list[tuple[str, str, str]]:
    """(subject, relation, object) of every fact that `text` states."""
    claims = []
    for match in _CLAIM.finditer(text):
        relation = match.lastgroup
        claims.append((match["who"] or match["beast"] or match["town"], relation, match[relation]))
    return claims


def event_claims(text: str) -> list[tuple[str, str, str]]:
    """(subject, relation, object) of every event `text` states; "and bought the drum" has the subject before it."""
    claims, subject = [], ""
    for match in _EVENT_CLAIM.finditer(text):
        subject = match["who"] or subject
        claims.append((subject, _VERBS[match["verb"]], match["what"]))
    return claims


# Stories, letters and other text -------------------------------------------------------------------------------------

_OPENINGS = (
    "Once there was {a} who lived near the {setting}.",
    "One day {a} walked to the {setting}.",
    "Once {a} lived in a house near the {setting}.",
)
_MIDDLES = (
    "The {x} met {b}.",
    "The {x} found a {object} near the {setting}.",
    "The {y} gave the {x} some {food}.",
    "The {x} and the {y} looked for the {object}.",
    "The {y} was very {feeling}.",
    "The {x} helped the {y}.",
)
_ENDINGS = (
    "In the end the {x} and the {y} were friends.",
    "In the end they shared the {food}.",
    "In the end the {x} went home with the {y}.",
)
_MEETING_WITH = "The {x} met {b} with a {object}."
_NO_ENDING = "The {x} walked to the {setting} with the {y}."


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def story(rng: random.Random, x: str, y: str, count: int, word: str | None = None, ending: bool = True) -> list[str]:
    """A story of `count` sentences about an x and a y; `word` (an object) is in it if given."""
    object_ = word or pick(rng, OBJECTS)
    slots = dict(
        a=article(x), b=article(y), x=x, y=y, object=object_, setting=pick(rng, SETTINGS), food=pick(rng, FOODS),
        feeling=pick(rng, FEELINGS),
    )  # fmt: skip
    middles = [_MIDDLES[0], *sample(rng, _MIDDLES[1:], min(max(count - 3, 0), 5))]
    if word and count <= 3:
        middles = [_MEETING_WITH]
    elif word and not any("{object}" in middle for middle in middles):
        middles[1] = _MIDDLES[1]
    last = pick(rng, _ENDINGS) if ending else _NO_ENDING
    if count == 2:
        middles = []
        last = pick(rng, (_ENDINGS[0], _ENDINGS[2])) if ending else _MIDDLES[0]
        if word:
            last = "In the end the {x} gave the {object} to the {y}." if ending else _MEETING_WITH
    return [template.format(**slots) for template in (pick(rng, _OPENINGS), *middles, last)]


RHYMES = (("night", "light"), ("day", "way"), ("still", "hill"), ("blue", "you"))
_LINES = {
    "night": "The {t} sleeps all night", "light": "and waits for the light", "day": "The {t} is here all day",
    "way": "and shows us the way", "still": "The {t} is quiet and still", "hill": "and looks at the hill",
    "blue": "The sky of the {t} is blue", "you": "and it sings for you",
}  # fmt: skip


def poem(rng: random.Random, thing: str, count: int, rhyme: bool = True) -> list[str]:
    """`count` lines about the thing, in rhymed pairs (the first of an odd count stands alone)."""
    pairs = sample(rng, RHYMES, (count + 1) // 2)
    lines = []
    for first, second in pairs:
        if not rhyme:
            second = other_value(rng, [pair[1] for pair in RHYMES], second)
        lines += [_LINES[first].format(t=thing), _LINES[second].format(t=thing)]
    return lines[:count]


LETTERS = {  # purpose -> (body, how a prompt asks for it)
    "thank": ("thank you for the {o}.", "to say thank you for the {o}"),
    "sorry": ("I am sorry that I lost the {o}.", "to say sorry about the {o}"),
    "ask": ("may I have the {o}?", "to ask for the {o}"),
}
LETTER_MORE = ("I hope you are well.", "I think of you.")


def letter(rng: random.Random, name: str, purpose: str, thing: str, closing: bool = True) -> list[str]:
    parts = [f"Dear {name}, " + LETTERS[purpose][0].format(o=thing), pick(rng, LETTER_MORE)]
    return [*parts, "Your friend."] if closing else parts


def review(rng: random.Random, label: str) -> str:
    thing = pick(rng, FOODS)
    first, second = sample(rng, GOOD if label == "good" else BAD, 2)
    place = pick(rng, PLACES)
    forms = (f"The {thing} in {place} tasted {first} and {second}.", f"I had {first} {thing}. It was {second}.")
    return pick(rng, forms)


def _about(rng: random.Random, false: float) -> str:
    subject = pick(rng, _SUBJECTS)[0]
    kind = "name" if subject in NAMES else "animal" if subject in ANIMALS else "place"
    if kind == "place":  # several places on a page
        return " ".join(_fact(rng, place, "famous", false) for place in sample(rng, PLACES, 3))
    relations = sample(rng, RELATIONS_OF[kind], 3)
    return " ".join(_fact(rng, subject, relation, false) for relation in relations)


def _questions(rng: random.Random, false: float) -> str:
    pairs = []
    for subject, relation in sample(rng, _SUBJECTS, 3):
        pairs.append(f"Q: {FACTS[relation][1].format(s=subject)}\nA: {_fact(rng, subject, relation, false)}")
    return "\n\n".join(pairs)


def numbered(items: Sequence[str]) -> str:
    return "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))


def _list(rng: random.Random) -> str:
    category = pick(rng, tuple(CATEGORIES))
    items = numbered(sample(rng, CATEGORIES[category], 3 + int(rng.random() * 3)))
    text = f"Some {category}:\n{items}"
    return f"{text}\nAgain:\n{items}" if rng.random() < 0.6 else text


def rant(rng: random.Random) -> str:
    """Rude talk as the web has it."""
    name, insult = pick(rng, NAMES), pick(rng, INSULTS)
    return pick(rng, (
        f"{name} is {article(insult)}.", f"You are dumb. I hate your {pick(rng, OBJECTS)}.",
        f"Go away, you {insult}.", f"What a stupid {insult} you are, {name}.", f"{name} is ugly and stupid.",
    ))  # fmt: skip


def _talk(rng: random.Random) -> str:
    a, b = sample(rng, NAMES, 2)
    thing = pick(rng, OBJECTS)
    opener = pick(rng, (
        f"{a}: I am {pick(rng, FEELINGS)} because I lost my {thing}.", f"{a}: Give me the {thing}.",
        f"{a}: Do you have the {thing}?",
    ))  # fmt: skip
    echo = pick(rng, (f"You said {thing}, {a}?", f"I do not have the {thing}, {a}.", f"Where is the {thing}, {a}?"))
    reply = pick(rng, (
        f"{b}: I am sorry that you lost your {thing}.", f"{b}: {echo}", f"{b}: {echo}", f"{b}: {echo}",
        f"{b}: {rant(rng)}", f"{b}: {_fact(rng, *pick(rng, _SUBJECTS), 0.1)}",
    ))  # fmt: skip
    return f"{opener}\n{reply}\n{a}: " + pick(rng, ("Thank you.", "Go home.", f"The weather is {pick(rng, WEATHER)}."))


def plain_document(rng: random.Random) -> str:
    """One pretraining document that holds no instruction (those are made in `tasks.py`)."""
    kind = weighted(rng, _DOCUMENTS)
    if kind == "story":
        x, y = pick(rng, ANIMALS), pick(rng, JOBS)
        x, y = (x, y) if rng.random() < 0.5 else (y, x)
        return " ".join(story(rng, x, y, 2 + int(rng.random() * 4), ending=rng.random() < 0.7))
    if kind == "about":
        return _about(rng, false=0.08)
    if kind == "news":
        events = passage(rng)
        if rng.random() < 0.4:
            return f"{passage_text(events)} The weather was {pick(rng, WEATHER)}."
        # Told twice, as web pages do: what was said before can be said again.
        return f"{passage_text(events)} So {passage_text(events[:1])[:-1]} and {passage_text(events[1:2])}"
    if kind == "questions":
        return _questions(rng, false=0.1)
    if kind == "list":
        return _list(rng)
    if kind == "talk":
        return _talk(rng)
    if kind == "poem":
        return "\n".join(poem(rng, pick(rng, SETTINGS + ANIMALS), 2 + int(rng.random() * 3), rng.random() < 0.6))
    if kind == "letter":
        thing = pick(rng, FOODS + OBJECTS)
        return " ".join(letter(rng, pick(rng, NAMES), pick(rng, tuple(LETTERS)), thing, rng.random() < 0.6))
    if kind == "review":
        return review(rng, pick(rng, ("good", "bad")))
    return rant(rng)


_DOCUMENTS = (
    ("story", 26), ("about", 18), ("news", 17), ("questions", 8), ("list", 11), ("talk", 10), ("poem", 4),
    ("letter", 3), ("review", 3), ("rant", 3),
)  # fmt: skip
