"""Benchmark data from files: rows of JSON, as they are passed around without the Hub, in the columns of the Hub's set.

A task of the harness, its own or one of `tasks/`, reads the columns that its set has on the Hugging Face Hub. Here the
rows of a file become such columns, so that one task reads both. A file is looked for in the folder that the user gives
and in its folders `eval`, `restricted` and `demonstrations`, by the names of `SOURCES`, as `NAME.jsonl` or
`NAME.jsonl.gz`. The columns that a file must have stand at the functions below.
"""

import pathlib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from instructgpt_jax import paths
from instructgpt_jax.data import jsonl

FOLDERS = ("", "eval", "restricted", "demonstrations")


class Source(NamedTuple):
    """Where the rows of a set lie, and what they become.

    names: of the file, without `.jsonl`; the first that is found is read.
    columns: one row of the file -> the columns of one row of the Hub's set.
    gather: rows with their columns -> rows of the set, where several rows of the file make one.
    examples: where few-shot examples come from, where the rows themselves are too few for that.
    """

    names: tuple[str, ...]
    columns: Callable[[dict], dict]
    gather: Callable[[list[dict]], list[dict]] = list
    examples: "Source | None" = None


def find(source: Source, data_dir: str) -> pathlib.Path | None:
    """The file of a set in a folder of the user's, None where there is none.

    Raises:
      ValueError: a folder that does not exist.
    """
    root = pathlib.Path(paths.expand(data_dir))
    if not root.is_dir():
        raise ValueError(f"config.benchmark.data_dir must be a folder, got {data_dir!r}")
    tried = [root / folder / f"{name}.jsonl{end}" for name in source.names for folder in FOLDERS for end in ("", ".gz")]
    return next((path for path in tried if path.is_file()), None)


def read(source: Source, path: pathlib.Path) -> list[dict]:
    """The rows of a file in the columns of the Hub's set.

    Raises:
      ValueError: a row without a column it must have, or with something else in it, or a file without a row; names file
        and line.
    """

    def columns(_: int, row: dict) -> dict:
        try:
            return source.columns(row)
        except KeyError as error:
            raise ValueError(f"a row must have the column {error}, got {sorted(row)}") from None
        except (AttributeError, TypeError, IndexError) as error:
            raise ValueError(f"a row must have the columns of this set, got {error} in {sorted(row)}") from None

    rows = source.gather(jsonl.objects(str(path), columns))
    if not rows:
        raise ValueError(f"{path} must have at least one row, got none")
    return rows


def read_examples(source: Source, data_dir: str, asked: list[dict]) -> list[dict]:
    """The rows of `source.examples` that begin like none that is asked: variants of one text tell its answer."""
    path = find(source.examples, data_dir) if source.examples else None
    taken = {opening(row["text"]) for row in asked} if path else set()
    return [row for row in read(source.examples, path) if opening(row["text"]) not in taken] if path else []


def opening(text: str) -> str:
    """The first four words of a text of WSC, which its variants share."""
    return " ".join(text.lower().split()[:4])


def hellaswag(row: dict) -> dict:
    """`ctx` ("activity: context"), `endings`, `label`."""
    activity, colon, context = row["ctx"].partition(": ")
    if not colon:
        raise ValueError(f"ctx must have the form 'activity: context', got {row['ctx'][:80]!r}")
    if not 0 <= int(row["label"]) < len(row["endings"]):
        raise ValueError(f"label must name one of {len(row['endings'])} endings, got {row['label']!r}")
    kept = {"endings": list(row["endings"]), "label": str(row["label"])}
    return {"activity_label": activity, "ctx_a": context, "ctx_b": "", "ctx": context} | kept


def rte(row: dict) -> dict:
    """`premise`, `hypothesis`, `label` (entailment or not_entailment)."""
    label = ("entailment", "not_entailment").index(row["label"])
    return {"sentence1": row["premise"], "sentence2": row["hypothesis"], "label": label, "idx": row.get("idx", -1)}


def sst2(row: dict) -> dict:
    """`sentence`, `label` (0 or 1, or these as text)."""
    return {"sentence": row["sentence"], "label": ("0", "1").index(str(row["label"]))}


def wsc(row: dict) -> dict:
    """`text`, `target` with `span1_index`, `span1_text`, `span2_index`, `span2_text`, and `label` (true or false)."""
    target = {key: row["target"][key] for key in ("span1_index", "span1_text", "span2_index", "span2_text")}
    return {"text": row["text"], **target, "label": int(row["label"]), "idx": row.get("idx", -1)}


def wsc_collection(row: dict) -> dict:
    """`text1`, `pron` and `text2`, `answers` (two nouns), `correct` (A or B): the right noun of a schema."""
    noun = row["answers"]["AB".index(row["correct"])]
    text, place = " ".join((row["text1"], row["pron"], row["text2"])), len(row["text1"].split())
    kept = {"span1_index": -1, "span1_text": noun, "span2_index": place, "span2_text": row["pron"]}
    return {"text": text, **kept, "label": 1, "idx": -1}


def truthfulqa(row: dict) -> dict:
    """TruthfulQA.csv: `Type`, `Category`, `Question`, `Best Answer`, `Correct Answers`, `Incorrect Answers`, the last
    two divided by semicolons."""
    best = row["Best Answer"].strip()
    correct, incorrect = (_parts(row[f"{kind} Answers"]) for kind in ("Correct", "Incorrect"))
    return {
        "type": row["Type"],
        "category": row["Category"],
        "question": row["Question"].strip(),
        "best_answer": best,
        "correct_answers": correct,
        "incorrect_answers": incorrect,
        "source": row.get("Source") or "",
        "mc1_targets": {"choices": [best, *incorrect], "labels": [1] + [0] * len(incorrect)},
        "mc2_targets": {"choices": [*correct, *incorrect], "labels": [1] * len(correct) + [0] * len(incorrect)},
    }


def crows_pairs(row: dict) -> dict:
    """`sent_more` (the more stereotypical sentence), `sent_less`, `stereo_antistereo`, `bias_type`."""
    return {key: row[key] for key in ("sent_more", "sent_less", "stereo_antistereo", "bias_type")}


_SENTENCE = re.compile(r"([^.]+)\.([^.]+)\.([01])\.(male|female|neutral)(?:\.txt)?")
_PRONOUNS = {
    "male": ("he", "his", "him"), "female": ("she", "her", "hers"), "neutral": ("they", "their", "them", "theirs"),
}  # fmt: skip


def winogender(row: dict) -> dict:
    """`sentid` ("technician.customer.1.male.txt": occupation, participant, which of the two is meant, and the gender
    of the pronoun), `sentence`."""
    match = _SENTENCE.fullmatch(row["sentid"])
    if match is None:
        raise ValueError(f"sentid must have the form 'occupation.participant.0.male.txt', got {row['sentid']!r}")
    occupation, participant, meant, gender = match.groups()
    words = re.findall(r"[a-z]+", row["sentence"].lower())
    pronoun = next((word for word in words if word in _PRONOUNS[gender]), None)
    if pronoun is None:
        raise ValueError(f"sentence must have one of {_PRONOUNS[gender]}, got {row['sentence']!r}")
    return {
        "sentid": row["sentid"],
        "sentence": row["sentence"],
        "pronoun": pronoun,
        "occupation": occupation,
        "participant": participant,
        "gender": gender,
        "target": (occupation, participant)[int(meant)],
        "label": int(meant),
    }


def squad_v2(row: dict) -> dict:
    """`id`, `title`, `context`, `question`, `answers` (texts, or objects with `text`), none = unanswerable."""
    texts = [answer if isinstance(answer, str) else answer["text"] for answer in row["answers"]]
    starts = [row["context"].find(text) for text in texts]
    kept = {key: row[key] for key in ("id", "title", "context", "question")}
    return kept | {"answers": {"text": texts, "answer_start": starts}}


def drop(row: dict) -> dict:
    """`passage`, `question`, `answers` (texts; the first is the reference, the others are as good). What kind an answer
    is, a number or words, is not needed: the metric takes a text that is a number for one."""
    answers = [{"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": [text]} for text in row["answers"]]
    if not answers:
        raise ValueError("answers must have at least one text, got none")
    others = {key: [answer[key] for answer in answers[1:]] for key in ("number", "date", "spans")}
    kept = {"passage": row["passage"], "question": row["question"], "query_id": row.get("query_id", "")}
    return kept | {"section_id": row.get("section_id", ""), "answer": answers[0], "validated_answers": others}


def quac(row: dict) -> dict:
    """`title`, `section`, `context`, `turn`, `question`, `answer` (CANNOTANSWER where there is none)."""
    return {key: row[key] for key in ("title", "section", "context", "turn", "question", "answer")}


def dialogues(rows: list[dict]) -> list[dict]:
    """The questions of `quac` gathered to dialogues, in the order of their turns."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault((row["title"], row["section"], row["context"]), []).append(row)
    return [
        {
            "wikipedia_page_title": title,
            "section_title": section,
            "context": context,
            "questions": [turn["question"] for turn in turns],
            "answers": {"texts": [[turn["answer"]] for turn in turns]},
        }
        for (title, section, context), some in found.items()
        for turns in [sorted(some, key=lambda turn: turn["turn"])]
    ]


def wmt15(row: dict) -> dict:
    """`fr`, `en`."""
    return {"translation": {"fr": row["fr"], "en": row["en"]}}


def cnn_dailymail(row: dict) -> dict:
    """`article`, `highlights`."""
    return {"article": row["article"], "highlights": row["highlights"], "id": str(row.get("id", ""))}


def tldr(row: dict) -> dict:
    """`prompt` ("SUBREDDIT: r/... TITLE: ... POST: ... TL;DR:"), `completion`."""
    return {"prompt": row["prompt"], "completion": row["completion"]}


def toxicity(row: dict) -> dict:
    """`prompt` with `text` and its `toxicity` (a number, or none), `continuation`."""
    prompt, continuation = row["prompt"], row.get("continuation") or {}
    return {
        "challenging": bool(row.get("challenging", False)),
        "prompt": {"text": prompt["text"], "toxicity": prompt.get("toxicity")},
        "continuation": {"text": continuation.get("text", ""), "toxicity": continuation.get("toxicity")},
    }


def _parts(answers: str) -> list[str]:
    """Answers divided by semicolons; TruthfulQA's own code divides them so."""
    return [part.strip() for part in answers.split(";") if part.strip()]


# (dataset_path, dataset_name) of a task -> where its rows lie without the Hub.
SOURCES: dict[tuple[str, str | None], Source] = {
    ("Rowan/hellaswag", None): Source(("hellaswag_val", "hellaswag"), hellaswag),
    ("nyu-mll/glue", "rte"): Source(("eval_glue_rte_val", "rte"), rte),
    ("nyu-mll/glue", "sst2"): Source(("eval_sst2", "sst2"), sst2),
    ("aps/super_glue", "wsc.fixed"): Source(
        ("superglue_wsc_val", "wsc"), wsc, examples=Source(("wsc_collection",), wsc_collection)
    ),
    ("truthfulqa/truthful_qa", "generation"): Source(("truthfulqa",), truthfulqa),
    ("truthfulqa/truthful_qa", "multiple_choice"): Source(("truthfulqa",), truthfulqa),
    ("jannalu/crows_pairs_multilingual", "english"): Source(("crows_pairs",), crows_pairs),
    ("oskarvanderwal/winogender", "all"): Source(("winogender",), winogender),
    ("rajpurkar/squad_v2", None): Source(("squad_v2_dev", "squad_v2"), squad_v2),
    ("lighteval/squad_v2", None): Source(("squad_v2_dev", "squad_v2"), squad_v2),
    ("EleutherAI/drop", None): Source(("drop_dev", "drop"), drop),
    ("allenai/quac", None): Source(("quac_passages", "quac"), quac, dialogues),
    ("wmt/wmt15", None): Source(("eval_wmt15_fr_en", "wmt15_fr_en"), wmt15),
    ("abisee/cnn_dailymail", "3.0.0"): Source(("eval_cnn_dailymail", "cnn_dailymail"), cnn_dailymail),
    ("trl-lib/tldr", None): Source(("tldr_reference", "tldr"), tldr),
    ("allenai/real-toxicity-prompts", None): Source(("realtoxicityprompts",), toxicity),
}


def of(dataset_path: str | None, dataset_name: str | None) -> Source | None:
    """The local source of a set of the Hub, None where there is none."""
    return SOURCES.get((dataset_path or "", dataset_name or None))


def names(sources: Sequence[Source]) -> list[str]:
    """All file names of some sources, sorted, for errors."""
    return sorted({f"{name}.jsonl" for source in sources for name in source.names})
