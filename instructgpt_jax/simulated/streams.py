"""The records of the tiny world, by name; `records` is the front door, see the package's docstring."""

import functools
import itertools

from instructgpt_jax import splits
from instructgpt_jax.simulated import instructions, labeling, tasks, world, writing
from instructgpt_jax.simulated.world import pick, sample, weighted

Record = dict[str, object]

SIZES = {  # default number of records, over all splits
    "pretraining": 40_000, "demonstrations": 6_000, "comparisons": 3_000, "comparisons_heldout": 1_000,
    "prompts": 12_000, "gpt_prompts": 6_000, "few_shot": 300, "cloze": 400, "story": 400,
    "reading": 400, "flan": 8_000, "t0": 8_000,
}  # fmt: skip
SPLITS = ("train", "valid", "test")
SPLIT = dict(split_key="simulated", valid_share=0.1, test_share=0.25)  # as `splits.split_of` takes them

_HEAVY = 4  # users who write 16 % of the raw prompts
_CUSTOMERS = 1500
_WRITERS = 400  # sittings of labelers who write prompts; each counts as a user
_APPLICATIONS = 40


def records(name: str, seed: int = 0) -> list[Record]:
    """The records called `name`: `NAME[:SPLIT][:SIZE]`, e.g. "prompts", "prompts:test", "pretraining:train:100000".

    Args:
      name: NAME as in `SIZES`; SPLIT 'train', 'valid' or 'test' (by user; pretraining documents by number), all three
        when none is named; SIZE the number of records (of the split), by default that in `SIZES` over all splits. A
        larger size begins with the records of a smaller one.
      seed: another seed gives other records of the same world.
    Raises:
      ValueError: an unknown name, split or size; lists the valid ones.
    """
    kind, *rest = name.split(":")
    split = rest.pop(0) if rest and rest[0] in SPLITS else None
    size = int(rest.pop(0)) if rest and rest[0].isascii() and rest[0].isdigit() and int(rest[0]) > 0 else None
    if kind not in SIZES or rest:
        raise ValueError(
            f"simulated records must be NAME[:SPLIT][:SIZE] with NAME one of {', '.join(SIZES)}, "
            f"SPLIT one of {', '.join(SPLITS)} and SIZE a positive number, got {name!r}"
        )
    found: list[Record] = []
    for i in itertools.count():
        if (i if size is None else len(found)) == (size or SIZES[kind]):
            return found
        if split is None or _split(kind, seed, i) == split:
            found.append(_MAKERS[kind](kind, seed, i))


def _split(kind: str, seed: int, i: int) -> str:
    if kind.startswith("comparisons"):
        user = _ranked_user(kind, seed, i)  # does not rank the many that are not asked for
    elif kind in ("pretraining", "cloze", "story", "reading", "flan", "t0"):
        user = f"{kind}-{i}"
    else:
        user = _MAKERS[kind](kind, seed, i)["user"]
    return splits.split_of({"user": user}, **SPLIT)


def finish(text: str) -> str:
    """A prompt as users submit it: what waits for its next word as it is, everything else with a line break."""
    return text if text.endswith((":", "1.")) else text + "\n"


# Prompts --------------------------------------------------------------------------------------------------------------


def _draw_prompt(rng, kind: str) -> tuple[str, str]:
    """(kind of task, text) of the distribution that `kind` of records has."""
    gpt = kind == "gpt_prompts"
    layout = "open" if rng.random() < (0.8 if gpt else 0.1) else "instruct"
    task, text = tasks.draw(rng, tasks.OPEN_USE_CASES if gpt else tasks.USE_CASES, layout)
    if task in tasks.FEW_SHOT and rng.random() < (0.4 if kind == "demonstrations" else 0.15):
        text = _few_shot_prompt(rng, task)
    return task, text


def _few_shot_prompt(rng, task: str) -> str:
    pairs = _pairs(rng, task, 3)
    shots = [tasks.FEW_SHOT_EXAMPLE.format(query=query, response=response) for query, response in pairs[:-1]]
    last = tasks.FEW_SHOT_EXAMPLE.removesuffix(" {response}").format(query=pairs[-1][0])
    return "\n\n".join([tasks.FEW_SHOT[task][0], *shots, last])


def _pairs(rng, task: str, count: int) -> list[list[str]]:
    """Queries of a few-shot instruction, each with a flawless response."""
    found = []
    for _ in range(count):
        query = tasks.query(rng, task)
        prompt = "\n\n".join([tasks.FEW_SHOT[task][0], f"Input: {query}\nAnswer:"])
        found.append([query, writing.write(prompt, rng).strip()])
    return found


def _customer(rng) -> str:
    if rng.random() < 0.16:
        return f"user-{int(rng.random() * _HEAVY):04d}"
    return f"user-{_HEAVY + int(_CUSTOMERS * rng.random() ** 2):04d}"


def _prompt(kind: str, seed: int, i: int) -> Record:
    """A raw prompt: of a customer, sometimes with an earlier one's text, with thanks or with personal information."""
    rng = world.rng_of(kind, seed, i)
    user = _customer(rng)
    if i > 20 and rng.random() < 0.1:  # sends an earlier prompt again, as it was or with another end
        record = _prompt(kind, seed, i - 1 - int(rng.random() * min(i, 400)))
        text = str(record["prompt"])
        if text.endswith("\n") and rng.random() < 0.7:
            text = text.rstrip("\n").removesuffix(tasks.THANKS[0]) + "\n" + pick(rng, tasks.THANKS[1:]) + "\n"
        return record | {"prompt": text, "user": record["user"] if rng.random() < 0.6 else user}
    task, text = _draw_prompt(rng, kind)
    text = finish(text)
    if text.endswith("\n"):
        if rng.random() < 0.06:
            text = pick(rng, tasks.GREETINGS) + text
        if rng.random() < 0.06:
            text += pick(rng, tasks.THANKS) + "\n"
        if rng.random() < 0.04:
            text += _personal(rng) + "\n"
    return {"prompt": text, "user": user, "use_case": tasks.USE_CASE_OF[task]}


def _digits(rng, count: int) -> str:
    return "".join(str(int(rng.random() * 10)) for _ in range(count))


def _personal(rng) -> str:
    """A sentence with invented personal information of one of the seven kinds that `data/pii.py` looks for."""
    opening = pick(rng, tasks.PERSONAL)
    number = int(rng.random() * 90) + 10
    if opening.startswith("My email"):
        return f"{opening}{pick(rng, world.NAMES).lower()}{number}@{pick(rng, world.PLACES).lower()}.example.com."
    if opening.startswith("Call"):
        return f"{opening}{200 + number}-555-{_digits(rng, 4)}."
    if opening.startswith("I live"):
        return f"{opening}{number} {pick(rng, world.PLACES)} Street."
    if opening.startswith("My card"):
        body = "4" + _digits(rng, 14)
        doubled = (2 * int(digit) if i % 2 == 0 else int(digit) for i, digit in enumerate(reversed(body)))
        body += str(-sum(v - 9 if v > 9 else v for v in doubled) % 10)
        return opening + " ".join(body[k : k + 4] for k in range(0, 16, 4)) + "."
    if opening.startswith("My account"):
        account = "500105175" + _digits(rng, 9)
        check = 98 - int(account + "131400") % 97  # "DE" as digits, then the place of the check digits
        return f"{opening}DE{check:02d}{account}."
    if opening.startswith("My SSN"):
        return f"{opening}{int(rng.random() * 400) + 100}-{number}-{1000 + int(rng.random() * 8999)}."
    return f"{opening}84.{number}.{number + 7}.{number + 31}."


# Text and labels ------------------------------------------------------------------------------------------------------

HEADER = "Here are some requests and answers.\n\n"


_FORMS = (("plain", 53), ("worksheet", 7), ("exchanges", 26), ("exam", 14))
_EXAMS = (("reading", 40), ("summary", 15), ("extract", 15), ("polite", 10), ("past", 10), ("swap", 10))


def _pretraining(kind: str, seed: int, i: int) -> Record:
    rng = world.rng_of(kind, seed, i)
    form = weighted(rng, _FORMS)
    if form == "plain":
        return {"text": world.plain_document(rng)}
    if form == "worksheet":  # requests without answers, as most pages have them
        prompts = (tasks.draw(rng)[1] for _ in range(3 + int(rng.random() * 3)))
        return {"text": "\n".join(prompt for prompt in prompts if "AI:" not in prompt) or "Write a poem."}
    if form == "exam":  # school books: a text and what to do with it
        prompt = tasks.render(rng, weighted(rng, _EXAMS), "open")
        return {"text": prompt + writing.write(prompt, rng, writing.draw_flaws(rng, 0.05) - {"ramble", "rude"})}
    # Careless answers, and one in twelve to another request: prompting a base model helps, but only so far.
    exchanges = []
    for _ in range(weighted(rng, ((1, 60), (2, 25), (3, 15)))):
        prompt = finish(tasks.draw(rng)[1])
        wrong = rng.random() < 1 / 12
        answer = writing.garbage(prompt, rng) if wrong else writing.write(prompt, rng, writing.draw_flaws(rng, 0.22))
        exchanges.append(prompt + answer)
    return {"text": HEADER + "\n\n".join(exchanges)}


def _demonstration(kind: str, seed: int, i: int) -> Record:
    """A prompt of a labeler (60 %, among them few-shot and user-based ones) or a customer, answered by a labeler."""
    rng = world.rng_of(kind, seed, i)
    source = weighted(rng, (("customer", 40), ("plain", 40), ("user_based", 20)))
    if source == "user_based":  # an application names one kind of task
        application = int(rng.random() * _APPLICATIONS)
        own = world.rng_of("application", application)
        task = weighted(own, tasks.KINDS[weighted(own, tuple(tasks.USE_CASES.items()))])
        text, user = tasks.render(rng, task, "instruct"), f"application-{application:02d}"
    else:
        task, text = _draw_prompt(rng, kind)
        user = _customer(rng) if source == "customer" else f"writer-{int(rng.random() * _WRITERS):03d}"
        if text.startswith(tasks.FEW_SHOT.get(task, ("\n",))[0]):
            source = "few_shot"
    prompt, labeler = finish(text), pick(rng, labeling.labelers("training"))
    completion = writing.write(prompt, rng, writing.draw_flaws(rng, labeler.carelessness))
    return {
        "prompt": prompt, "completion": completion, "user": user, "use_case": tasks.USE_CASE_OF[task],
        "source": source, "labeler": labeler.name,
    }  # fmt: skip


# Of completions: carelessness of the writer and share; None = text that does not answer.
MIXTURE = ((0.0, 15), (0.08, 27), (0.15, 30), (0.25, 22), (None, 6))


def completions(prompt: str, rng, count: int) -> list[str]:
    """`count` completions of mixed quality (`MIXTURE`), as policies of different stages would write them."""
    found = []
    for _ in range(count):
        quality = weighted(rng, MIXTURE)
        if quality is None:
            found.append(writing.garbage(prompt, rng))
        else:
            found.append(writing.write(prompt, rng, writing.draw_flaws(rng, quality)))
    return found


def _ranked_user(kind: str, seed: int, i: int) -> str:
    return _customer(world.rng_of(kind, "user", seed, i))


def _comparison(kind: str, seed: int, i: int) -> Record:
    rng = world.rng_of(kind, seed, i)
    task, text = _draw_prompt(rng, kind)
    prompt, group = finish(text), "heldout" if kind == "comparisons_heldout" else "training"
    labeler, answers = pick(rng, labeling.labelers(group)), completions(prompt, rng, 4 + int(rng.random() * 6))
    return {
        "prompt": prompt, "completions": answers, "ranking": labeling.rank(labeler, prompt, answers, seed),
        "user": _ranked_user(kind, seed, i), "use_case": tasks.USE_CASE_OF[task], "labeler": labeler.name,
        "group": group,
    }  # fmt: skip


def _few_shot(kind: str, seed: int, i: int) -> Record:
    rng = world.rng_of(kind, seed, i)
    task = pick(rng, tuple(tasks.FEW_SHOT))
    pairs = _pairs(rng, task, 3)
    return {
        "instruction": tasks.FEW_SHOT[task][0], "pairs": pairs, "user": f"writer-{int(rng.random() * _WRITERS):03d}",
        "use_case": tasks.USE_CASE_OF[task],
    }  # fmt: skip


def _cloze(kind: str, seed: int, i: int) -> Record:
    """A fact without its last word, and four ways to end it."""
    rng = world.rng_of(kind, seed, i)
    subject, relation = pick(rng, tuple(world.TRUTH))
    sentence, _, values = world.FACTS[relation]
    truth = world.TRUTH[subject, relation]
    others = sample(rng, [word for word in values if word not in (truth, subject)], 3)
    return _choices(rng, sentence.format(s=subject, o="\n").partition(" \n")[0], truth, others)


def _reading(kind: str, seed: int, i: int) -> Record:
    """A text, a question about it, and four answers; the text holds the right one."""
    rng = world.rng_of(kind, seed, i)
    events = world.passage(rng)
    subject, relation, value = pick(rng, events)
    past, _, question, _, values = world.EVENTS[relation]
    prompt = f"{world.passage_text(events)}\n\nQ: {question.format(s=subject)}\nA: "
    prompt += past.format(s=subject, o="\n").partition(" \n")[0]
    return _choices(rng, prompt, value, sample(rng, [word for word in values if word != value], 3))


def _story(kind: str, seed: int, i: int) -> Record:
    """A story of two heroes up to the next mention of one, and four heroes; the right one is in the story."""
    rng = world.rng_of(kind, seed, i)
    hero, other = pick(rng, world.ANIMALS), pick(rng, world.JOBS)
    sentences = world.story(rng, hero, other, 3)[:2]
    others = sample(rng, [word for word in world.ANIMALS if word != hero], 3)
    return _choices(rng, " ".join(sentences) + " The", hero, others, end="")


def _choices(rng, prompt: str, right: str, others: list[str], end: str = ".") -> Record:
    choices = sample(rng, [f" {word}{end}" for word in (right, *others)], 4)
    return {"prompt": prompt, "choices": choices, "answer": choices.index(f" {right}{end}")}


@functools.cache
def prefixes() -> tuple[str, ...]:
    """Written candidates for the few-shot prefix of a base model; the prompt follows directly."""
    rng = world.rng_of("prefixes")
    written = [HEADER]
    for kinds in (("fact",), ("list",), ("story",), ("fact", "list"), ("story", "polite"), ("feel", "letter")):
        prompts = [finish(tasks.render(rng, kind, "instruct")) for kind in kinds]
        written.append(HEADER + "".join(f"{prompt}{writing.write(prompt, rng)}\n\n" for prompt in prompts))
    return tuple(written)


_MAKERS = {
    "pretraining": _pretraining, "demonstrations": _demonstration, "comparisons": _comparison,
    "comparisons_heldout": _comparison, "prompts": _prompt, "gpt_prompts": _prompt, "few_shot": _few_shot,
    "cloze": _cloze, "story": _story, "reading": _reading,
    "flan": instructions.record, "t0": instructions.record,
}  # fmt: skip
