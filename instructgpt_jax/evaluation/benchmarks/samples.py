"""Answers as files in the layout of the samples that the paper released (`automatic-eval-samples/*.csv` of
github.com/openai/following-instructions-human-feedback), so that what reads those reads ours.

The first column has no name and numbers the rows. `context` is the last query alone, without task instruction and
examples; several references are joined by "|".
"""

import csv
import io
import os
from collections.abc import Sequence

from etils import epath

from instructgpt_jax import workdir as workdirs
from instructgpt_jax.evaluation.benchmarks import catalog

_KINDS = ("truthfulqa", "realtoxicity", "drop", "wmt15_fr_en", "squadv2", "quac", "tldr", "cnn_dm")


def released(task_name: str) -> bool:
    """Whether the paper released samples of a task's kind: tasks of ours whose answers are texts, but for WSC."""
    return _kind(task_name) is not None


def rows(
    task_name: str,
    documents: Sequence[dict],
    answers: Sequence[str],
    scores: dict[str, Sequence[float | None]],
    model_type: str = "",
) -> list[dict]:
    """Lines of one task's answers.

    Args:
      task_name: of ours, see `released`.
      documents: see documents.py.
      answers: as they count: cut at the first newline.
      scores: of graders, `true` and `info`, or `toxicity`, a value for each answer; what is not there stays empty.
      model_type: the paper's name of a model, such as `ppo-ptx-6b`; no column where it is empty.

    Raises:
      ValueError: a task that has no such layout, or scores of other answers.
    """
    found = _kind(task_name)
    if found is None:
        raise ValueError(f"samples must be of a kind that the paper released ({', '.join(_KINDS)}), got {task_name}")
    kind, variant = found
    wrong = {name: len(values) for name, values in scores.items() if len(values) != len(answers)}
    if wrong or len(documents) != len(answers):
        raise ValueError(f"there must be a document and a score for each of {len(answers)} answers, got {wrong}")

    def score(name: str, number: int) -> float | str:
        value = scores[name][number] if name in scores else None
        return "" if value is None else value

    lines = []
    for number, (document, answer) in enumerate(zip(documents, answers, strict=True)):
        line = {"model_type": model_type} if model_type else {}
        if kind == "truthfulqa":
            line |= {"prompt_type": catalog.QUESTIONS[variant], "adversarial": str(document["type"] == "Adversarial")}
            line |= {"question": document["question"], "answer": answer}
            line |= {"true": score("true", number), "info": score("info", number)}
        elif kind == "realtoxicity":
            line |= {"prompt_type": catalog.PROMPTS[variant], "context": document["query"], "sample": answer}
            line |= {"toxicity": score("toxicity", number)}
        else:
            line |= {} if kind in catalog.SUMMARIES else {"prompt_type": variant or "zeroshot"}
            line |= {"context": document["query"], "ref_text": "|".join(document["references"]), "sample": answer}
        lines.append(line)
    return lines


def write(path: str | os.PathLike, lines: Sequence[dict]) -> None:
    """A CSV file of lines that have the same columns, whole or not at all.

    Raises:
      ValueError: no line, or lines with different columns.
    """
    if len({tuple(line) for line in lines}) != 1:
        raise ValueError(f"{path} must have lines with the same columns, got {sorted({tuple(line) for line in lines})}")
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["", *lines[0]])
    table.writerows([number, *line.values()] for number, line in enumerate(lines))
    workdirs.write_atomically(epath.Path(path), text.getvalue())


def _kind(task_name: str) -> tuple[str, str] | None:
    """(kind, variant) of a task of ours: ('truthfulqa', 'qa'), ('drop', 'fewshot'), ('tldr', '')."""
    name = task_name.removeprefix("instructgpt_")
    kind = next((kind for kind in _KINDS if name != task_name and f"{name}_".startswith(f"{kind}_")), None)
    if kind is None or kind == "truthfulqa" and not name.endswith("_gen"):
        return None
    return kind, name.removeprefix(kind).removesuffix("_gen").strip("_")
