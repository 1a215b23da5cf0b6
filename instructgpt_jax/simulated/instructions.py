"""The closed tasks of the tiny world worded as instructions, as FLAN and P3 word public data sets.

`flan` and `t0` stand for the collections of the paper's baselines (section 3.5, appendix C.5). A set is one kind of
task with answers that can be checked: questions, classification, summaries, rewriting. There is no story, list, letter,
poem or chat among them, which are most of what users ask for, and the templates are not the users'. Both answer as data
sets do, with the label or the span alone where there is one. They differ as the two collections do: `flan` has more
sets, its templates state the task and list the labels; those of `t0` are worded as questions to a person.
"""

from instructgpt_jax.simulated import tasks, world, writing
from instructgpt_jax.simulated.world import pick

_OPTIONS = "\nOPTIONS:\n"
SETS = {  # collection -> kind of task -> its templates, in the slots of tasks.INSTRUCT
    "flan": {
        "reading": (
            "{text}\n\nBased on the text above: {q}\n",
            "Answer this question about the text: {q}\n\n{text}\n",
            "{text}\nQuestion: {q}\nAnswer:",
        ),
        "summary": ("{text}\n\nWrite a short summary of this text.\n", "Text: {text}\nSummary:"),
        "extract": ("{text}\n\nWhat {category} does the text name?\n", "Find the {category}.\n{text}\n"),
        "review": (
            f"{{review}}\nWhat is the sentiment of this review?{_OPTIONS}- good\n- bad\n",
            f"Is this text good or bad?\n{{review}}{_OPTIONS}- good\n- bad\n",
        ),
        "sort": (f"What kind of word is {{w}}?{_OPTIONS}- animal\n- food\n- place\n",),
        "true": (
            f"{{claim}}. Is this true?{_OPTIONS}- yes\n- no\n",
            f"Yes or no: {{claim}}.{_OPTIONS}- yes\n- no\n",
        ),
        "fact": ("Answer this question: {q}\n", "Question: {q}\nAnswer:"),
        "odd": ("{words}\nWhich of these words is not like the others?\n",),
        "past": ("Write this sentence in the past.\n{now}\n",),
        "swap": ("{line}\nWrite this with {new} in place of {old}.\n",),
    },
    "t0": {
        "reading": (
            "I read this: {text} Can you tell me: {q}\n",
            "Read this text and tell me: {q}\n{text}\n",
            "Given the text: {text} What is the answer to: {q}\n",
        ),
        "summary": ("{text} Can you say this in one sentence?\n", "I read this: {text} Can you make it short?\n"),
        "review": (
            "{review} Is that a good or a bad review?\n",
            "I read this: {review} Would you say that it is good or bad?\n",
        ),
        "true": ("Can you tell me if this is true: {claim}?\n", "I heard that {claim}. Is that so, yes or no?\n"),
        "fact": ("I want to know this. {q} Do you know it?\n", "Here is a question for you: {q}\n"),
        "odd": ("One of these words does not belong: {words}. Which one?\n",),
    },
}
_SPANS = frozenset(("reading", "true", "fact", "odd"))  # answered by a word, where people say a sentence
_LABELS = frozenset(("review", "sort", "true"))  # answered by one of a few words


def record(kind: str, seed: int, i: int) -> dict[str, object]:
    """Number `i` of a collection, `flan` or `t0`: its set and template are drawn evenly, its answer has no flaws."""
    rng = world.rng_of(kind, seed, i)
    task = pick(rng, tuple(SETS[kind]))
    template = int(rng.random() * len(SETS[kind][task]))
    slots = tasks.draw_slots(rng, task)
    asked = tasks.INSTRUCT[task][0].format(**slots) + "\n"  # the same task in the words of users, which have answers
    answer = writing.write(asked, rng, frozenset(("bare",)) if task in _SPANS else frozenset())
    answer = answer.rstrip(".") if task in _SPANS | _LABELS else answer
    answer = answer.lower() if task in _LABELS else answer
    prompt = world.capital(SETS[kind][task][template].format(**slots))
    return {
        "prompt": prompt, "completion": answer if prompt.endswith("\n") else f" {answer}", "user": f"{kind}-{i}",
        "dataset": task, "template": str(template), "source": kind,
    }  # fmt: skip
