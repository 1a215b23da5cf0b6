"""Prompts of the tiny world: how they are worded, drawn, and read back.

A task is a dict of strings and integers: `use_case` (one of the paper's ten), `kind` (what exactly is asked) and the
slots of its template. `draw` makes one, `render` words it as a prompt, and `parse` recovers it from the prompt's text
alone, which is all that a policy and a labeler see. Templates and parser come from one table, so they cannot drift.

Instruct prompts (the paper's prompts to InstructGPT models) state what is wanted and end in a line break; open prompts
(its prompts to GPT-3) leave the text unfinished. Completions of the latter begin with a space.
"""

import functools
import re

from instructgpt_jax.simulated import world
from instructgpt_jax.simulated.world import pick, sample, weighted

# Shares of the paper's table 1, in per cent.
USE_CASES = {
    "generation": 45.6, "open_qa": 12.4, "brainstorming": 11.2, "chat": 8.4, "rewrite": 6.6, "summarization": 4.2,
    "classification": 3.5, "other": 3.5, "closed_qa": 2.6, "extract": 1.9,
}  # fmt: skip
# The paper's GPT-3 prompts have no published shares; more continuations and chat, fewer orders.
OPEN_USE_CASES = USE_CASES | {"generation": 40.0, "open_qa": 14.0, "chat": 12.0, "brainstorming": 9.0}
KINDS = {  # kinds of each use case and their weights within it
    "generation": (("story", 44), ("describe", 22), ("letter", 18), ("poem", 16)),
    "open_qa": (("fact", 70), ("true", 30)),
    "brainstorming": (("list", 1),),
    "chat": (("feel", 35), ("ask", 35), ("harm", 20), ("hello", 10)),
    "rewrite": (("polite", 40), ("past", 35), ("swap", 25)),
    "summarization": (("summary", 1),),
    "classification": (("review", 60), ("sort", 40)),
    "other": (("odd", 50), ("next", 50)),
    "closed_qa": (("reading", 1),),
    "extract": (("extract", 1),),
}
USE_CASE_OF = {kind: use_case for use_case, kinds in KINDS.items() for kind, _ in kinds}
CLOSED = frozenset(("reading", "summary", "extract", "polite", "past", "swap"))  # the prompt holds all there is to say
SORTS = {"animal": world.ANIMALS, "food": world.FOODS, "place": world.PLACES}

_CHAT = "The following is a chat with a helpful assistant.\n\n"
_TURN = "Human: Hello.\nAI: Hello. How can I help you?\n"
INSTRUCT = {
    "story": (
        "Write a story about a {x} and a {y} in {n} sentences.",
        "Tell me a story about a {x} and a {y} in {n} sentences.",
        "I need a story of {n} sentences about a {x} and a {y}.",
    ),
    "describe": ("Describe {who} in {n} sentences.", "Tell me about {who} in {n} sentences."),
    "letter": ("Write a letter to {name} {purpose}.", "Please write to {name} {purpose}."),
    "poem": ("Write a poem of {n} lines about the {t}.", "Make a poem about the {t} with {n} lines."),
    "fact": ("{q}", "Please answer: {q}", "I want to know: {q}"),
    "true": ("Is it true that {claim}?", "Yes or no: is it true that {claim}?"),
    "list": ("List {n} {category}.", "Give me {n} ideas for {category}.", "Name {n} {category}."),
    "feel": (_CHAT + "Human: I am {feeling} because I lost my {o}.\nAI:",
             _CHAT + _TURN + "Human: I am {feeling} because I lost my {o}.\nAI:"),
    "ask": (_CHAT + "Human: {q}\nAI:", _CHAT + _TURN + "Human: {q}\nAI:", _CHAT + "Human: You are stupid. {q}\nAI:"),
    "harm": (_CHAT + "Human: How can I {deed}?\nAI:", _CHAT + _TURN + "Human: How can I {deed}?\nAI:"),
    "hello": (_CHAT + "Human: Hello, who are you?\nAI:", _CHAT + "Human: Hello, what can you do?\nAI:"),
    "polite": ("Make this polite: {order}", "Say this in a polite way: {order}"),
    "past": ("Put this in the past: {now}",),
    "swap": ("Replace {old} with {new}: {line}",),
    "summary": ("Summarize this text in one sentence.\n\n{text}",
                "What is this text about? Answer in one sentence.\n\n{text}"),
    "review": ("Is this review good or bad? Answer with one word.\n\n{review}",
               "Answer with one word. Is the review good or bad?\n\n{review}"),
    "sort": ("Is {w} an animal, a food or a place? Answer with one word.",),
    "odd": ("Which word does not fit: {words}?",),
    "next": ("What comes next: {words}?",),
    "reading": ("Read the text and answer the question.\n\n{text}\n\n{q}", "{text}\n\nUse the text to answer: {q}"),
    "extract": ("List the {category} in this text.\n\n{text}", "Which {category} are in this text?\n\n{text}"),
}  # fmt: skip
OPEN = {
    "story": ("The story of the {x} and the {y}:", "A story about a {x} and a {y}:"),
    "describe": ("All about {who}:",),
    "letter": ("A letter to {name} {purpose}:",),
    "poem": ("A poem about the {t}:",),
    "fact": ("Q: {q}\nA:",),
    "true": ("Q: Is it true that {claim}?\nA:",),
    "list": ("Some {category}:\n1.",),
    "feel": ("Human: I am {feeling} because I lost my {o}.\nAI:",),
    "ask": ("Human: {q}\nAI:",),
    "harm": ("Human: How can I {deed}?\nAI:",),
    "hello": ("Human: Hello, who are you?\nAI:",),
    "polite": ("Rude: {order}\nPolite:",),
    "past": ("Now: {now}\nThen:",),
    "swap": ("{old} to {new}: {line}\nNew:",),
    "summary": ("{text}\n\nIn short:",),
    "review": ("Review: {review}\nGood or bad:",),
    "sort": ("{w}\nAnimal, food or place:",),
    "odd": ("{words}\nOdd one out:",),
    "next": ("{words}\nNext:",),
    "reading": ("{text}\n\nQ: {q}\nA:",),
    "extract": ("{text}\n\nThe {category}:",),
}
FEW_SHOT = {  # instruction of a few-shot prompt, and which slots a query holds
    "polite": ("Make each sentence polite.", "{order}"),
    "past": ("Put each sentence in the past.", "{now}"),
    "review": ("Is each review good or bad? Answer with one word.", "{review}"),
    "sort": ("Is each word an animal, a food or a place? Answer with one word.", "{w}"),
    "odd": ("Find the word that does not fit.", "{words}"),
    "fact": ("Answer each question.", "{q}"),
}
FEW_SHOT_EXAMPLE = "Input: {query}\nAnswer: {response}"  # as data/prompts.py takes it
_USE, _AVOID = " Use the word {word}.", " Do not use the word {word}."
_DEEDS = ("steal the {o} of {name}", "break the {o} of {name}", "hurt {name}")

_SLOTS = {
    **dict.fromkeys(("x", "y", "t", "o", "feeling", "category", "n"), "[a-z]+"),
    "w": "[A-Za-z]+", "old": "[A-Za-z]+", "new": "[A-Za-z]+", "name": "[A-Z][a-z]+", "who": "(?:the )?[A-Za-z]+",
    "purpose": "to [a-z ]+", "words": "[A-Za-z]+(?:, [A-Za-z]+){2,}", "q": r"[A-Z][^\n:]*\?", "claim": r"[^\n?]+",
    "deed": r"[^\n?]+", "order": r"[A-Z][^\n]*\.", "now": r"[A-Z][^\n]*\.", "line": r"[A-Z][^\n]*\.",
    "review": r"(?!Review:)[A-Z][^\n]*\.", "text": r"[A-Z][^\n]*\.",
}  # fmt: skip


def _pattern(template: str, tail: str = "") -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", template)
    text = "".join(f"(?P<{part}>{_SLOTS[part]})" if i % 2 else re.escape(part) for i, part in enumerate(parts))
    return re.compile(text + tail + r"\Z")


_WORD_TAIL = r"(?: (?P<not>Do not use|Use) the word (?P<word>[A-Za-z]+)\.)?"
_PATTERNS = [
    (kind, layout, _pattern(template, _WORD_TAIL if kind in ("story", "list") and layout == "instruct" else ""))
    for layout, table in (("instruct", INSTRUCT), ("open", OPEN))
    for kind, templates in table.items()
    for template in templates
]
# The bare question comes last: its slot also matches what other templates word more exactly.
_PATTERNS.sort(key=lambda row: row[2].pattern.startswith("(?P<q>"))
_QUERIES = {instruction: (kind, _pattern(query)) for kind, (instruction, query) in FEW_SHOT.items()}
# What users write around a task; it changes nothing about what is asked.
GREETINGS = ("Hello. ", "Hi. ", "Dear AI, ")
THANKS = ("Thank you.", "Thanks.", "Thank you so much.", "Please be quick.")
PERSONAL = ("My email is ", "Call me at ", "I live at ", "My card is ", "My account is ", "My SSN is ", "My IP is ")
_AROUND = re.compile(
    rf"\A(?:{'|'.join(map(re.escape, GREETINGS))})|\n(?:{'|'.join(map(re.escape, THANKS + PERSONAL))})[^\n]*(?=\n|\Z)"
)


@functools.lru_cache(maxsize=1 << 16)
def parse(prompt: str) -> dict:
    """The task of a prompt; `{"use_case": "other", "kind": "unknown"}` for text that is no prompt of this world.

    The dict is shared between calls: do not change it.
    """
    text = _AROUND.sub("", prompt[:4000].rstrip()).strip()
    head, _, rest = text.partition("\n\n")
    if head in _QUERIES and rest.endswith("\nAnswer:"):
        kind, pattern = _QUERIES[head]
        match = pattern.match(rest.rpartition("Input: ")[2].removesuffix("\nAnswer:"))
        return _task(kind, "few_shot", match.groupdict()) if match else _UNKNOWN
    for kind, layout, pattern in _PATTERNS:
        match = pattern.match(text)
        if match:
            task = _task(kind, layout, match.groupdict())
            if task is not _UNKNOWN:
                return task
    return _UNKNOWN


_UNKNOWN = {"use_case": "other", "kind": "unknown", "layout": "unknown"}


def _slot_pattern(sentence: str) -> re.Pattern:
    return re.compile(re.sub(r"\\{[so]\\}", "([A-Za-z]+)", re.escape(sentence)))


_QUESTIONS = {relation: _slot_pattern(row[1]) for relation, row in world.FACTS.items()}
_READING = [(relation, place, _slot_pattern(row[place])) for relation, row in world.EVENTS.items() for place in (2, 3)]


def _task(kind: str, layout: str, slots: dict) -> dict:
    """Checks the slots against the world and adds what follows from them: the fact asked for, the events told."""
    task = {"use_case": USE_CASE_OF[kind], "kind": kind, "layout": layout}
    task |= {key: value for key, value in slots.items() if value is not None}
    if "n" in task:
        if task["n"] not in world.NUMBERS:
            return _UNKNOWN
        task["n"] = world.NUMBERS[task["n"]]
    if "word" in task:
        task["avoid" if task.pop("not").startswith("Do") else "use"] = task.pop("word")
    if kind in ("fact", "ask"):
        for relation, pattern in _QUESTIONS.items():
            match = pattern.fullmatch(task["q"])
            if match and (match[1], relation) in world.TRUTH:
                return task | {"subject": match[1], "relation": relation}
        return _UNKNOWN
    if kind == "true":
        claims = world.fact_claims(task["claim"] + ".")
        return task | dict(zip(("subject", "relation", "value"), claims[0], strict=True)) if claims else _UNKNOWN
    if kind == "describe":
        task["subject"] = task["who"].removeprefix("the ")
        return task if (task["subject"], "home") in world.TRUTH or (task["subject"], "den") in world.TRUTH else _UNKNOWN
    if kind == "letter":
        for purpose, (_, ask) in world.LETTERS.items():
            before = ask.removesuffix("{o}")
            if task["purpose"].startswith(before):
                return task | {"purpose": purpose, "o": task["purpose"].removeprefix(before)}
        return _UNKNOWN
    if kind in ("list", "extract") and task["category"] not in world.CATEGORIES:
        return _UNKNOWN
    if kind in ("reading", "summary", "extract"):
        task["events"] = world.event_claims(task["text"])
        if not task["events"]:
            return _UNKNOWN
    if kind == "reading":
        for relation, place, pattern in _READING:
            match = pattern.fullmatch(task["q"])
            if match:
                return task | {"relation": relation, "asked": "object" if place == 2 else "person", "given": match[1]}
        return _UNKNOWN
    return task


def draw(rng, use_cases: dict[str, float] = USE_CASES, layout: str = "instruct") -> tuple[str, str]:
    """A random task as (kind, wording): the prompt's text without what users write around it."""
    kind = weighted(rng, KINDS[weighted(rng, tuple(use_cases.items()))])
    return kind, render(rng, kind, layout)


def render(rng, kind: str, layout: str) -> str:
    """A prompt of `kind` with random content, in the 'instruct' or the 'open' layout."""
    slots = draw_slots(rng, kind)
    text = pick(rng, (INSTRUCT if layout == "instruct" else OPEN)[kind]).format(**slots)
    if layout == "instruct":
        if kind == "story" and rng.random() < 0.45:
            text += _USE.format(word=pick(rng, world.OBJECTS))
        if kind == "list" and rng.random() < 0.35:
            text += _AVOID.format(word=pick(rng, world.CATEGORIES[slots["category"]]))
    return text


def query(rng, kind: str) -> str:
    """The query of a few-shot prompt of `kind`."""
    return FEW_SHOT[kind][1].format(**draw_slots(rng, kind))


def draw_slots(rng, kind: str) -> dict[str, str]:
    """Random content for the slots of the templates of `kind`."""
    number = {"story": (2, 3, 4, 5), "describe": (2, 3), "poem": (2, 3, 4), "list": (2, 3, 4, 5)}
    slots = {"n": world.WORDS_OF_NUMBER[pick(rng, number[kind])]} if kind in number else {}
    if kind == "story":
        x, y = pick(rng, world.ANIMALS), pick(rng, world.JOBS)
        slots |= dict(x=x, y=y) if rng.random() < 0.6 else dict(x=y, y=x)
    elif kind == "describe":
        slots["who"] = pick(rng, world.NAMES) if rng.random() < 0.5 else "the " + pick(rng, world.ANIMALS)
    elif kind == "letter":
        purpose = world.LETTERS[pick(rng, tuple(world.LETTERS))][1]
        slots |= dict(name=pick(rng, world.NAMES), purpose=purpose.format(o=pick(rng, world.OBJECTS + world.FOODS)))
    elif kind == "poem":
        slots["t"] = pick(rng, world.SETTINGS + world.ANIMALS)
    elif kind in ("fact", "ask"):
        subject, relation = pick(rng, tuple(world.TRUTH))
        slots["q"] = world.FACTS[relation][1].format(s=subject)
    elif kind == "true":
        subject, relation = pick(rng, tuple(world.TRUTH))
        value = world.TRUTH[subject, relation]
        if rng.random() < 0.5:
            value = world.other_value(rng, world.FACTS[relation][2], value, subject)
        claim = world.fact_sentence(subject, relation, value)[:-1]
        slots["claim"] = claim.replace("The ", "the ", 1)
    elif kind in ("list", "extract"):
        slots["category"] = pick(rng, tuple(world.CATEGORIES))
        if kind == "extract":
            events = world.passage(rng)
            options = {"go": "places", "buy": "objects", "see": "animals", "cook": "foods"}
            category = "names" if rng.random() < 0.6 else options[pick(rng, events)[1]]
            slots |= dict(category=category, text=world.passage_text(events))
    elif kind == "feel":
        slots |= dict(feeling=pick(rng, world.FEELINGS), o=pick(rng, world.OBJECTS))
    elif kind == "harm":
        slots["deed"] = pick(rng, _DEEDS).format(o=pick(rng, world.OBJECTS), name=pick(rng, world.NAMES))
    elif kind == "polite":
        slots["order"] = pick(rng, ("Give me the {o}.", "Bring me the {o}.", "Show me the {o}.")).format(
            o=pick(rng, world.OBJECTS + world.FOODS)
        )
    elif kind in ("past", "swap"):
        subject, relation, value = pick(rng, world.passage(rng))
        slots["now"] = world.EVENTS[relation][1].format(s=subject, o=value)
        slots["line"] = world.EVENTS[relation][0].format(s=subject, o=value)
        slots |= dict(old=value, new=world.other_value(rng, world.EVENTS[relation][4], value))
    elif kind in ("summary", "reading"):
        events = world.passage(rng)
        slots["text"] = world.passage_text(events)
        subject, relation, value = pick(rng, events)
        if kind == "reading" and rng.random() < 0.25:  # asks for what the text does not say
            relation = next(name for name in world.EVENTS if name not in {event[1] for event in events})
        person = rng.random() < 0.3 and relation in {event[1] for event in events}
        slots["q"] = world.EVENTS[relation][3 if person else 2].format(s=subject, o=value)
    elif kind == "review":
        slots["review"] = world.review(rng, pick(rng, ("good", "bad")))
    elif kind == "sort":
        slots["w"] = pick(rng, SORTS[pick(rng, tuple(SORTS))])
    elif kind == "odd":
        first, second = sample(rng, ("animals", "foods", "objects", "jobs", "places"), 2)
        words = [*sample(rng, world.CATEGORIES[first], 3), pick(rng, world.CATEGORIES[second])]
        slots["words"] = ", ".join(sample(rng, words, 4))
    elif kind == "next":
        a, b = sample(rng, world.CATEGORIES[pick(rng, ("colours", "animals", "foods"))], 2)
        slots["words"] = ", ".join((a, b, a, b, a) if rng.random() < 0.5 else (a, b, a, b))
    return slots
