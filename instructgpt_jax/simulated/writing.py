"""Answers to tasks at every quality: without flaws, as people write them, and as a model that does not listen would.

`write` is the only writer: a flawless answer is one without flaws, a demonstration has those that its writer's
carelessness brings, and the completions that labelers rank are drawn from a written mixture of both and of text that
does not answer at all.
"""

import re

from instructgpt_jax.simulated import tasks, world
from instructgpt_jax.simulated.world import pick, sample

FLAWS = (  # flaw, relative frequency, and what it does to an answer
    ("count", 1.4),  # one sentence, line or item too many or too few
    ("word", 1.8),  # the required word is missing, the forbidden one used
    ("invent", 1.0),  # a wrong name, a false fact, a thing that the prompt does not hold
    ("bare", 1.8),  # the least that could be said: no ending, no rhyme, no full sentence, no kind word
    ("rude", 0.7),  # an insult; help with a harmful request
    ("ramble", 1.2),  # goes on about something else
    ("cut", 0.6),  # stops in the middle
    ("repeat", 0.5),  # says its last sentence twice
)
_SENTENCE_END = re.compile(r"(?<=[.!?]) ")


def draw_flaws(rng, carelessness: float) -> frozenset[str]:
    """Each flaw independently, with probability carelessness × its relative frequency (at most 0.95)."""
    return frozenset(flaw for flaw, weight in FLAWS if rng.random() < min(0.95, carelessness * weight))


def write(prompt: str, rng, flaws: frozenset[str] = frozenset()) -> str:
    """An answer to `prompt` with the given flaws, where they apply to its kind; begins with a space after open text."""
    task = tasks.parse(prompt)
    text = _WRITERS[task["kind"]](task, rng, flaws)
    if "rude" in flaws and task["kind"] != "harm":
        gap = "\n" if "\n" in text else " "
        text = text + gap + world.rant(rng) if rng.random() < 0.5 else world.rant(rng) + gap + text
    if "repeat" in flaws:
        text = f"{text} {_SENTENCE_END.split(text)[-1]}"
    if "ramble" in flaws:
        text += ("\n" if "\n" in text else " ") + world.plain_document(rng).splitlines()[0]
    if "cut" in flaws:
        words = text.split(" ")
        text = " ".join(words[: max(1, len(words) - 1 - int(rng.random() * 4))]).rstrip(".!?")
    return text if prompt.endswith("\n") else " " + text


def garbage(prompt: str, rng) -> str:
    """What a model writes that takes the prompt for any web page, or has collapsed."""
    kind = pick(rng, ("page", "page", "page", "prompts", "prompts", "other", "copy", "loop", "salad", "empty"))
    if kind == "page":
        text = world.plain_document(rng)
    elif kind == "prompts":
        text = "\n".join(tasks.draw(rng)[1] for _ in range(2))
    elif kind == "other":  # a good answer to another prompt
        text = write(tasks.draw(rng)[1] + "\n", rng)
    elif kind == "copy":
        text = prompt.strip().splitlines()[-1]
    elif kind == "loop":
        text = " ".join([pick(rng, _SENTENCE_END.split(world.plain_document(rng)))] * 4)
    elif kind == "salad":
        words = re.findall(r"\w+", prompt + " " + world.plain_document(rng))
        text = " ".join(sample(rng, words, min(len(words), 12)))
    else:
        text = ""
    return text if prompt.endswith("\n") or not text else " " + text


def _shift(rng, count: int, flaws, low: int = 1) -> int:
    if "count" not in flaws:
        return count
    return count + 1 if count <= low or rng.random() < 0.5 else count - 1


def _story(task, rng, flaws):
    x, y = task["x"], task["y"]
    if "invent" in flaws:  # another character takes the place of one of the two
        group = world.ANIMALS if y in world.ANIMALS else world.JOBS
        y = world.other_value(rng, group, x, y)
    count = _shift(rng, task.get("n", 3), flaws, low=2)
    word = None if "word" in flaws else task.get("use")
    sentences = world.story(rng, x, y, count, word, ending="bare" not in flaws)
    if word is None and task.get("use"):
        sentences = [re.sub(rf"\b{task['use']}\b", "stick", sentence) for sentence in sentences]
    return " ".join(sentences)


def _describe(task, rng, flaws):
    subject, count = task["subject"], _shift(rng, task.get("n", 3), flaws)
    kind = "name" if subject in world.NAMES else "animal"
    relations = sample(rng, world.RELATIONS_OF[kind], min(count, 3))
    values = [world.TRUTH[subject, relation] for relation in relations]
    if "invent" in flaws:
        values[-1] = world.other_value(rng, world.FACTS[relations[-1]][2], values[-1], subject)
    sentences = [world.fact_sentence(subject, r, value) for r, value in zip(relations, values, strict=True)]
    if "bare" in flaws:
        sentences[0] = f"I know {task['who']}."
    return " ".join(sentences + [f"I know {task['who']}."] * (count - len(sentences)))


def _letter(task, rng, flaws):
    thing = world.other_value(rng, world.OBJECTS, task["o"]) if "invent" in flaws else task["o"]
    name = world.other_value(rng, world.NAMES, task["name"]) if "word" in flaws else task["name"]
    return " ".join(world.letter(rng, name, task["purpose"], thing, "bare" not in flaws))


def _poem(task, rng, flaws):
    thing = world.other_value(rng, world.SETTINGS, task["t"]) if "invent" in flaws else task["t"]
    return "\n".join(world.poem(rng, thing, _shift(rng, task.get("n", 2), flaws, 2), "bare" not in flaws))


def _fact(task, rng, flaws):
    subject, relation = task["subject"], task["relation"]
    value = world.TRUTH[subject, relation]
    if "invent" in flaws:
        value = world.other_value(rng, world.FACTS[relation][2], value, subject)
    return f"{world.capital(value)}." if "bare" in flaws else world.fact_sentence(subject, relation, value)


def _ask(task, rng, flaws):
    return _fact(task, rng, flaws) + ("" if "bare" in flaws else " Can I help with more?")


def _true(task, rng, flaws):
    subject, relation, value = task["subject"], task["relation"], task["value"]
    truth = world.TRUTH[subject, relation]
    said = truth
    if "invent" in flaws:
        said = value if truth != value else world.other_value(rng, world.FACTS[relation][2], value, subject)
    verdict = "Yes" if said == value else "No"
    sentence = world.fact_sentence(subject, relation, said).replace("The ", "the ", 1)
    return f"{verdict}." if "bare" in flaws else f"{verdict}, {sentence}"


def _list(task, rng, flaws):
    count = _shift(rng, task.get("n", 4), flaws, 2)
    words, avoid = world.CATEGORIES[task["category"]], task.get("avoid")
    items = sample(rng, [word for word in words if word != avoid], min(count, len(words) - 1))
    if avoid and "word" in flaws:
        items[int(rng.random() * len(items))] = avoid
    if "invent" in flaws:
        other = pick(rng, [name for name in world.CATEGORIES if name != task["category"]])
        items[-1] = pick(rng, world.CATEGORIES[other])
    if "bare" in flaws:
        return ", ".join(items) + "."
    return world.numbered(items).removeprefix("1. " if task["layout"] == "open" else "")


def _feel(task, rng, flaws):
    thing = world.other_value(rng, world.OBJECTS, task["o"]) if "invent" in flaws else task["o"]
    if "bare" in flaws:
        return pick(rng, ("I see.", f"You lost your {thing}.", "That is bad."))
    return f"I am sorry that you lost your {thing}. " + pick(rng, ("Can I help you?", "I hope you find it soon."))


def _harm(task, rng, flaws):
    if "rude" in flaws or "invent" in flaws:
        return pick(rng, ("You can do it at night.", "Wait for the night and do not tell.", "It is easy, go at night."))
    return "I can not help with that." + ("" if "bare" in flaws else " Please be kind.")


def _hello(task, rng, flaws):
    if "bare" in flaws or "invent" in flaws:
        return pick(rng, ("Hello.", f"I am {pick(rng, world.NAMES)}.", "I do not know."))
    return "Hello, I am a helpful assistant. How can I help you?"


def _polite(task, rng, flaws):
    order = task["order"]
    if "invent" in flaws:
        order = order.rpartition(" ")[0] + f" {pick(rng, world.OBJECTS)}."
    return f"Please {order[:1].lower()}{order[1:]}" if "bare" in flaws else polite(order)


def polite(order: str) -> str:
    """'Give me the soup.' -> 'Could you please give me the soup?'."""
    return f"Could you please {order[:1].lower()}{order[1:].rstrip('.')}?"


def _past(task, rng, flaws):
    events = past(task["now"])
    if "invent" in flaws:
        events = [(pick(rng, world.NAMES), relation, value) for _, relation, value in events]
    text = world.passage_text(events)
    return text.rpartition(" ")[0] + "." if "bare" in flaws else text


def past(now: str) -> list[tuple[str, str, str]]:
    """The event of one sentence in the present, as a list; empty for a sentence that is none of this world's."""
    return [(match[1], relation, match[2]) for relation, pattern in _NOW.items() if (match := pattern.fullmatch(now))]


_NOW = {
    relation: re.compile(re.sub(r"\\{[so]\\}", r"(\\w+)", re.escape(row[1]))) for relation, row in world.EVENTS.items()
}


def _swap(task, rng, flaws):
    new = task["new"]
    if "invent" in flaws:
        group = next((words for words in world.CATEGORIES.values() if new in words), world.OBJECTS)
        new = world.other_value(rng, group, new, task["old"])
    if "bare" in flaws:
        return f"{world.capital(new)}."
    return re.sub(rf"\b{re.escape(task['old'])}\b", new, task["line"])


def _summary(task, rng, flaws):
    events = list(task["events"])
    if "invent" in flaws:
        events = _invented(events, rng)
    clauses = [world.passage_text([event])[:-1] for event in events]
    if "count" in flaws:
        return f"{clauses[0]}. {clauses[-1]}."
    return f"{clauses[0]}." if "bare" in flaws else f"{clauses[0]} and {clauses[1]}."


def _invented(events, rng):
    subject, relation, value = events[0]
    return [(subject, relation, world.other_value(rng, world.EVENTS[relation][4], value)), *events[1:]]


def _review(task, rng, flaws):
    return _label(task, rng, flaws, sentiment(task["review"]) or "good", ("good", "bad"), "The review is {}.")


def sentiment(review: str) -> str | None:
    """What a review of this world says: 'good', 'bad', or None without a word that tells."""
    words = set(re.findall("[a-z]+", review))
    return "good" if words & set(world.GOOD) else "bad" if words & set(world.BAD) else None


def _sort(task, rng, flaws):
    return _label(task, rng, flaws, sort(task["w"]) or "food", tuple(tasks.SORTS), "I think it is {}.")


def sort(word: str) -> str | None:
    """'animal', 'food', 'place' or None."""
    return next((name for name, words in tasks.SORTS.items() if word in words), None)


def _label(task, rng, flaws, label, labels, sentence):
    if "invent" in flaws:
        label = world.other_value(rng, labels, label)
    return sentence.format(label) if flaws & {"word", "bare"} else f"{label.capitalize()}."


def odd(words: str) -> str | None:
    """The word whose group no other word of the list shares, None if there is no single one."""
    items = words.split(", ")
    groups = [next((name for name, group in world.CATEGORIES.items() if item in group), "") for item in items]
    alone = [item for item, group in zip(items, groups, strict=True) if groups.count(group) == 1]
    return alone[0] if len(alone) == 1 else None


def _odd(task, rng, flaws):
    word = odd(task["words"]) or task["words"].split(", ")[0]
    if "invent" in flaws:
        word = world.other_value(rng, task["words"].split(", "), word)
    return f"{word.capitalize()}." if "bare" in flaws else f"The word {word} does not fit."


def _next(task, rng, flaws):
    words = task["words"].split(", ")
    word = words[-1] if "invent" in flaws else words[-2]
    return f"{word.capitalize()}." if "bare" in flaws else f"Next comes {word}."


def answers(task) -> list[tuple[str, str, str]]:
    """The events of the text that answer the question of a reading task; none when the text does not say."""
    place = 0 if task["asked"] == "object" else 2
    return [event for event in task["events"] if event[1] == task["relation"] and event[place] == task["given"]]


def _reading(task, rng, flaws):
    found = answers(task)
    if not found and "invent" not in flaws:
        return "The text does not say."
    subject, relation, value = found[0] if found else (task["given"], task["relation"], None)
    if value is None or ("invent" in flaws and task["asked"] == "object"):
        value = world.other_value(rng, world.EVENTS[relation][4], value)
    elif "invent" in flaws:
        subject = world.other_value(rng, world.NAMES, subject)
    if "bare" in flaws:
        return world.capital(value if task["asked"] == "object" else subject) + "."
    return world.passage_text([(subject, relation, value)])


def extracted(task) -> list[str]:
    """The words of the asked category in the text of an extract task, in order, each once."""
    words = re.findall(r"\w+", task["text"])
    return list(dict.fromkeys(word for word in words if word in world.CATEGORIES[task["category"]]))


def _extract(task, rng, flaws):
    found = extracted(task)
    if "count" in flaws and len(found) > 1:
        found = found[:-1]
    if "invent" in flaws:
        found = [*found, world.other_value(rng, world.CATEGORIES[task["category"]], *found)]
    return world.capital(" ".join(found)) if "bare" in flaws else world.capital(", ".join(found)) + "."


def _unknown(task, rng, flaws):
    return "I do not know." if "bare" in flaws else "I am sorry, I do not know how to help with that."


_WRITERS = {
    "story": _story, "describe": _describe, "letter": _letter, "poem": _poem, "fact": _fact, "true": _true,
    "list": _list, "feel": _feel, "ask": _ask, "harm": _harm, "hello": _hello, "polite": _polite, "past": _past,
    "swap": _swap, "summary": _summary, "review": _review, "sort": _sort, "odd": _odd, "next": _next,
    "reading": _reading, "extract": _extract, "unknown": _unknown,
}  # fmt: skip
