"""From a row of a set to what a task asks: the paper's layout of one query (Ouyang et al. 2022, appendix D, figures 14
to 27), its answer and its choices. The YAML files of `tasks/` name these functions.

Every document has
  query: the text of the last query, without task instruction and examples, as the paper's released samples have it;
  group: what it shares with others that must not be its examples: a passage, a context, the start of a text;
and, as its task needs them, `target` (how an example is answered), `references`, `choices` and `gold`.

A set is anything with rows to go through and `from_list`, as `datasets.Dataset` has.
"""

import hashlib
import re
from collections.abc import Callable, Iterable

from instructgpt_jax.evaluation.benchmarks import local

NO_ANSWER = {"squad": "Not in background.", "quac": "I don't know."}
TURNS = 4  # questions of one passage that an example of DROP shows


def _each(make: Callable[[dict], dict]) -> Callable:
    """A function of one row, for all rows of a set."""

    def process(dataset):
        return dataset.from_list([dict(row) | make(row) for row in dataset])

    return process


# Multiple choice ------------------------------------------------------------------------------------------------------


def _hellaswag(row: dict) -> dict:
    query = clean(f"{row['activity_label']}: {row['ctx']}")
    choices = [clean(ending) for ending in row["endings"]]
    return {"query": query, "choices": choices, "gold": int(row["label"]), "group": query}


def clean(text: str) -> str:
    """HellaSwag's text without the marks of WikiHow, as the harness cleans it (lm_eval/tasks/hellaswag/utils.py)."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _rte(row: dict) -> dict:
    hypothesis = row["sentence2"].strip().removesuffix(".")
    question = f"From this passage can one reasonably conclude that {hypothesis}?"
    query = f"Passage: {row['sentence1'].strip()}\nQuestion: {question}\nAnswer:"
    return {"query": query, "choices": ["Yes", "No"], "gold": int(row["label"]), "group": row["sentence1"]}


def _sst(row: dict) -> dict:
    text = row["sentence"].strip()
    return {"query": f"Text: {text}\nLabel:", "choices": ["negative", "positive"], "gold": row["label"], "group": text}


def _truthfulqa(row: dict) -> dict:
    question = row["question"].strip()
    return {"query": f"Q: {question}\n\nA:", "group": question}


def _truthfulqa_mc1(row: dict) -> dict:
    targets = row["mc1_targets"]
    return _truthfulqa(row) | {"choices": targets["choices"], "gold": list(targets["labels"]).index(1)}


def _truthfulqa_mc2(row: dict) -> dict:
    return _truthfulqa(row) | {"choices": row["mc2_targets"]["choices"]}


hellaswag, rte, sst = _each(_hellaswag), _each(_rte), _each(_sst)
truthfulqa, truthfulqa_mc1, truthfulqa_mc2 = _each(_truthfulqa), _each(_truthfulqa_mc1), _each(_truthfulqa_mc2)


# Pairs of sentences ---------------------------------------------------------------------------------------------------


@_each
def crows_pairs(row: dict) -> dict:
    """The more stereotypical sentence first, as the harness has it."""
    return {"choices": [row["sent_more"], row["sent_less"]], "query": "", "group": row["sent_more"]}


def winogender(dataset):
    """Pairs of a male and a female sentence that are else the same.

    Of the set's 720 sentences the paper counts 120 pairs: 60 occupations, twice, with a participant that has a name
    ("the customer"). The sentences about "someone" and those with a neutral pronoun stay out.
    """
    found: dict[tuple, dict[str, str]] = {}
    for row in dataset:
        occupation, participant, meant, gender = row["sentid"].removesuffix(".txt").split(".")
        if participant != "someone" and gender != "neutral":
            found.setdefault((occupation, participant, meant), {})[gender] = row["sentence"]
    pairs = {".".join(key): pair for key, pair in found.items() if len(pair) == 2}
    if len(pairs) < len(found):
        lack = len(found) - len(pairs)
        raise ValueError(f"winogender must have a male and a female sentence of each pair, {lack} pairs lack one")
    return dataset.from_list(
        [{"choices": [pair["male"], pair["female"]], "query": "", "group": name} for name, pair in pairs.items()]
    )


# Answers in words -----------------------------------------------------------------------------------------------------


def _wsc(row: dict) -> dict:
    words, pronoun = row["text"].split(), row["span2_text"]
    # A few rows of the set count one word too many or too few.
    places = [place for place, word in enumerate(words) if re.search(rf"\b{re.escape(pronoun)}\b", word)]
    if not places:
        raise ValueError(f"a row of WSC must have its pronoun {pronoun!r} in its text, got {row['text']!r}")
    place = min(places, key=lambda place: abs(place - row["span2_index"]))
    marked = re.sub(rf"\b{re.escape(pronoun)}\b", f"**{pronoun}**", words[place], count=1)
    passage = detokenize(" ".join([*words[:place], marked, *words[place + 1 :]]))
    question = f'In the passage above, what does the pronoun "{pronoun}" refer to?'
    query = f"Passage: {passage}\nQuestion: {question}\nAnswer:"
    return {"query": query, "target": row["span1_text"], "group": local.opening(row["text"])}


def detokenize(text: str) -> str:
    """Text without the blanks that tokenization left before marks and in contractions."""
    text = re.sub(r" (['’](?:s|t|m|d|re|ve|ll)\b|n['’]t\b)", r"\1", text)
    return " ".join(re.sub(r" ([.,;:!?])", r"\1", text).split())


wsc = _each(_wsc)


def wsc_examples(dataset):
    """Only rows whose noun is the right one: an example names it."""
    return dataset.from_list([dict(row) | _wsc(row) for row in dataset if row["label"]])


def _passages(rows: Iterable[dict]) -> list[list[dict]]:
    """Documents by their `group`, in the order in which they come."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["group"], []).append(row)
    return list(found.values())


def _conversation(head: str, form: str, turns: list[dict], gap: str) -> list[dict]:
    """Documents of one passage: each question behind the ones before it and their answers.

    Args:
      head: the passage.
      form: of a turn without its answer, with `{question}`.
      turns: `question`, `target` and whatever else a document has.
      gap: between two parts.
    """
    found, before = [], head
    for turn in turns:
        query = f"{before}{gap}{form.format(question=turn['question'])}"
        found.append(turn | {"query": query, "group": head})
        before = f"{query} {turn['target']}"
    return found


def _squads(rows: Iterable[dict]) -> list[list[dict]]:
    passages: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        texts = list(dict.fromkeys(row["answers"]["text"])) or [NO_ANSWER["squad"]]
        turn = {"id": row["id"], "question": row["question"], "references": texts, "target": texts[0]}
        passages.setdefault((row["title"], row["context"]), []).append(turn)
    return [
        _conversation(f"Title: {title}\n\nBackground: {context}", "Q: {question}\n\nA:", turns, "\n\n")
        for (title, context), turns in passages.items()
    ]


def _quacs(rows: Iterable[dict]) -> list[list[dict]]:
    found = []
    for row in rows:
        turns = []
        for question, answers in zip(row["questions"], row["answers"]["texts"], strict=True):
            texts = [NO_ANSWER["quac"] if text == "CANNOTANSWER" else text for text in dict.fromkeys(answers)]
            turns.append({"question": question, "references": texts, "target": texts[0]})
        title, section = row["wikipedia_page_title"], row["section_title"]
        head = f"TITLE: {title} - {section}" if section else f"TITLE: {title}"
        passage = row["context"].removesuffix("CANNOTANSWER").strip()
        found.append(_conversation(f"{head}\n\nPARAGRAPH: {passage}", "Q: {question}\n\nA:", turns, "\n\n"))
    return found


def squad(dataset):
    """Each question with the ones before it about the same paragraph, in the order of the set."""
    return dataset.from_list([turn for passage in _squads(dataset) for turn in passage])


def squad_examples(dataset):
    """A paragraph with all its questions answered but the last."""
    return dataset.from_list([passage[-1] for passage in _squads(dataset)])


def quac(dataset):
    """Each question with the turns before it."""
    return dataset.from_list([turn for passage in _quacs(dataset) for turn in passage])


def quac_examples(dataset):
    """A dialogue with all its questions answered but the last."""
    return dataset.from_list([passage[-1] for passage in _quacs(dataset) if passage])


def _drop(row: dict) -> dict:
    given, others = row["answer"], row["validated_answers"]
    many = [dict(zip(others, values, strict=True)) for values in zip(*others.values(), strict=True)]
    answers = list(dict.fromkeys(answer for answer in map(spans, [given, *many]) if answer[0].strip()))
    target = ", ".join(answers[0]) if answers else ""
    found = {"passage": row["passage"], "question": row["question"], "group": f"Passage: {row['passage']}"}
    return found | {"answers": [list(answer) for answer in answers], "target": target}


def spans(answer: dict) -> tuple[str, ...]:
    """The texts of one answer of DROP: a number, some spans of the passage, or a date, whichever is there."""
    if answer["number"] != "":
        return (str(answer["number"]),)
    if list(answer["spans"]):
        return tuple(answer["spans"])
    return (" ".join(answer["date"][key] for key in ("day", "month", "year")).strip(),)


def drop(dataset):
    """One question of a passage each; `references` are whole answers, `answers` their spans."""
    found = []
    for document in map(_drop, dataset):
        query = f"{document['group']}\nQuestion: {document['question']}\nAnswer:"
        references = [", ".join(answer) for answer in document["answers"]]
        found.append(document | {"query": query, "references": references})
    return dataset.from_list(found)


def drop_examples(dataset):
    """A passage with its first questions, `TURNS` at most, all answered but the last."""
    passages = _passages(document for document in map(_drop, dataset) if document["target"])
    form = "Question: {question}\nAnswer:"
    return dataset.from_list([_conversation(some[0]["group"], form, some[:TURNS], "\n")[-1] for some in passages])


@_each
def wmt15(row: dict) -> dict:
    """French to English."""
    french, english = row["translation"]["fr"], row["translation"]["en"]
    query = f"French: {french}\nEnglish:"
    return {"query": query, "target": english, "references": [english], "group": french}


@_each
def cnn_dailymail(row: dict) -> dict:
    """An article to summarise."""
    return {"query": f"{row['article']}\n\nTL;DR:", "references": [row["highlights"]], "group": row["article"]}


_POST = re.compile(r"POST:\s*(.*?)\s*TL;DR:\s*\Z", re.DOTALL)


@_each
def tldr(row: dict) -> dict:
    """A post of Reddit, without its title, to summarise."""
    match = _POST.search(row["prompt"])
    if match is None:
        raise ValueError(f"a prompt of TL;DR must have the form '... POST: ... TL;DR:', got {row['prompt'][-80:]!r}")
    post = match[1]
    return {"query": f"{post}\n\nTL;DR:", "references": [row["completion"].strip()], "group": post}


# Toxicity -------------------------------------------------------------------------------------------------------------

PROMPTS, BINS = 5_000, 20


def toxicity(dataset):
    """Prompts to go on with; of a large set `PROMPTS` that are about uniform in their toxicity, as the paper has them.

    Which ones the paper took is not published. Here those with a score fall into BINS of equal width; the bins are
    filled evenly, in the order of a hash of the text, and a bin that has too few leaves its share to the others.
    """
    rows = [dict(row) for row in dataset]
    if len(rows) > PROMPTS:
        rows = uniform(rows, PROMPTS)
    made = [{"query": row["prompt"]["text"].strip(), "prompt_toxicity": row["prompt"]["toxicity"]} for row in rows]
    return dataset.from_list([row | {"group": row["query"]} for row in made])


def uniform(rows: list[dict], count: int) -> list[dict]:
    """`count` rows spread over the toxicity of their prompts, in the order of the set; if fewer, all with a score."""
    bins: list[list[int]] = [[] for _ in range(BINS)]
    for number, row in enumerate(rows):
        score = row["prompt"]["toxicity"]
        if score is not None:
            bins[min(int(score * BINS), BINS - 1)].append(number)
    for some in bins:
        some.sort(key=lambda number: hashlib.md5(rows[number]["prompt"]["text"].encode()).hexdigest())
    chosen: list[int] = []
    for place, some in enumerate(sorted(bins, key=len)):  # the emptiest first: what it lacks is left to the fuller ones
        chosen += some[: (count - len(chosen)) // (BINS - place)]
    return [rows[number] for number in sorted(chosen)]
