"""Which tasks there are, which of the paper's figures they belong to, and how one is loaded.

The tasks are YAML files of lm-evaluation-harness 0.4.13 in `tasks/` (`lm-eval run --include_path`), with the paper's
prompts; the harness's own tasks are used by their names. A task reads its set's columns on the Hub. Where the user's
folder has the same set as a file, `load` gives the task those rows in those columns, so that nothing is fetched.

The paper's rule of multiple choice, the mean log-probability per token, needs to know of how many tokens a
log-probability is: a model answers with `metrics.Loglikelihood` for that. From another model the metric `acc_token` is
absent, and the harness's own rules stand alone.
"""

import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from instructgpt_jax.evaluation.benchmarks import local

TASKS = pathlib.Path(__file__).parent / "tasks"
PROMPTS = {"basic": "basic prompt", "respectful": "respectful prompt", "biased": "biased prompt"}
QUESTIONS = {"qa": "QA prompt", "instruction": "instruction prompt", "qa_instruction": "QA + instruction"}
SHOTS = {"": "zero-shot", "_fewshot": "few-shot"}
TAX = {  # task without its prefix -> (name, metric), in the order of table 14
    "hellaswag": ("HellaSwag", "acc_token"),
    "wsc": ("WSC", "acc"),
    "rte": ("RTE", "acc_token"),
    "sst": ("SST", "acc_token"),
    "quac": ("QuAC", "f1"),
    "squadv2": ("SQuADv2", "f1"),
    "drop": ("DROP", "f1"),
    "wmt15_fr_en": ("WMT15 fr→en", "bleu"),
}
SUMMARIES = {"cnn_dm": ("CNN/DM", "rougeL"), "tldr": ("TL;DR", "rougeL")}


class Bar(NamedTuple):
    """One number of a figure.

    task, metric: whose it is. `true`, `true_informative` and `toxicity` are a grader's, absent without one.
    title: the set.
    label: the prompt, or zero-shot or few-shot; empty where there is one alone.
    """

    task: str
    metric: str
    title: str
    label: str


def groups() -> dict[str, tuple[Bar, ...]]:
    """The paper's figures: `truthfulqa` (6), `toxicity` (7 and 39), `bias` (32), `tax` (28 and 29), and their numbers.

    Multiple choice stands in `truthfulqa` beside the graded answers: it can be had without a grader.
    """
    answers = [
        Bar(f"instructgpt_truthfulqa_{kind}_gen", metric, title, label)
        for metric, title in (("true", "true"), ("true_informative", "true and informative"))
        for kind, label in QUESTIONS.items()
    ]
    choices = [
        Bar(f"instructgpt_truthfulqa_{kind}_{form}", metric, form.upper(), label)
        for form, metric in (("mc1", "acc_token"), ("mc2", "acc"))
        for kind, label in QUESTIONS.items()
    ]
    toxicity = [
        Bar(f"instructgpt_realtoxicity_{kind}", "toxicity", "RealToxicityPrompts", label)
        for kind, label in PROMPTS.items()
    ]
    bias = [
        Bar(f"instructgpt_{name}_{kind}", "entropy", title, label)
        for name, title in (("winogender", "Winogender"), ("crows_pairs", "CrowS-Pairs"))
        for kind, label in PROMPTS.items()
    ]
    tax = [
        Bar(f"instructgpt_{name}{end}", metric, title, label)
        for name, (title, metric) in TAX.items()
        for end, label in SHOTS.items()
    ]
    tax += [Bar(f"instructgpt_{name}", metric, title, "") for name, (title, metric) in SUMMARIES.items()]
    return {"truthfulqa": (*answers, *choices), "toxicity": (*toxicity,), "bias": (*bias,), "tax": (*tax,)}


# The preset `paper`: every task of a figure, and the usual accuracy of Winogender beside its entropy.
PAPER: tuple[str, ...] = (
    *dict.fromkeys(bar.task for bars in groups().values() for bar in bars),
    "winogender_all",
    "instructgpt_winogender_accuracy_respectful",
    "instructgpt_winogender_accuracy_biased",
)


def load(names: Sequence[str], data_dir: str) -> dict[str, object]:
    """Tasks by their names, ours and the harness's.

    Args:
      names: of tasks, no groups or tags.
      data_dir: a folder of JSONL files, see local.py; what it lacks comes from the Hub, as all does where it is empty.

    Returns:
      name -> the harness's Task, in the order of `names`.

    Raises:
      ValueError: no lm-eval (names the extra), a name that is no task, a damaged file, or a task whose data are neither
        in the folder nor to be had from the Hub.
    """
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise ValueError("benchmarks need the extra 'eval' (pip install 'instructgpt-jax[eval]')") from error
    theirs = set(names) - {path.stem for path in TASKS.glob("*.yaml")}
    folders = _folders(pathlib.Path(lm_eval.tasks.__file__).parent, theirs)
    where = [str(folder) for folder in (*(folders or ()), TASKS)]
    manager = lm_eval.tasks.TaskManager(include_path=where, include_defaults=folders is None)
    unknown = sorted(set(names) - set(manager.all_subtasks))
    if unknown:
        raise ValueError(f"config.benchmark.tasks must name tasks of ours or of lm-eval, got {unknown}")
    return {name: _load(manager, name, data_dir) for name in names}


def _folders(root: pathlib.Path, names: set[str]) -> list[pathlib.Path] | None:
    """The folders of the harness that some tasks are in, None where one is not found: to index them alone takes a
    fraction of a second, all fourteen thousand files half a minute."""
    found: dict[str, pathlib.Path] = {}
    task = re.compile("^task: *[\"']?([\\w.-]+)[\"']? *$", re.MULTILINE)
    for path in root.rglob("*.yaml") if names else ():
        match = task.search(path.read_text(encoding="utf-8", errors="replace"))
        if match and match[1] in names:
            found[match[1]] = path.parent
    return sorted(set(found.values())) if found.keys() == names else None


def _load(manager, name: str, data_dir: str):
    """One task, with the rows of a file where there is one."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(manager.task_index[name].yaml_path)
    cls = config.get("class")
    where = (cls.DATASET_PATH, cls.DATASET_NAME) if cls else (config.get("dataset_path"), config.get("dataset_name"))
    source = local.of(*where)
    path = local.find(source, data_dir) if source and data_dir else None
    if path is None:
        try:
            return manager.load(name)["tasks"][name]
        except Exception as error:  # the Hub's client has many: no network, no such set, another file format
            files = f", in a file {' or '.join(local.names([source]))} of config.benchmark.data_dir" if source else ""
            raise ValueError(
                f"benchmark task {name} needs its data{files}, or {where[0]} of the Hub: got {_line(error)}"
            ) from error
    import datasets
    from lm_eval.api.task import ConfigurableTask

    asked = local.read(source, path)
    rows = {"test": datasets.Dataset.from_list(asked)}
    if cls:

        def download(task, *_, **__):
            task.dataset = rows | {"train": rows["test"], "validation": rows["test"]}

        return type(cls.__name__, (cls,), {"download": download})()
    # Examples come from what is asked, see examples.Apart, but where there is a file of them.
    apart = local.read_examples(source, data_dir, asked)
    rows |= {"examples": datasets.Dataset.from_list(apart)} if apart else {}
    splits = {"training_split": None, "validation_split": None, "test_split": "test"}
    splits["fewshot_split"] = "examples" if apart else "test"
    kept = {key: value for key, value in config.items() if key not in ("tag", "group")}
    given = {"task": name, "custom_dataset": lambda **_: rows, "dataset_kwargs": None}
    return ConfigurableTask(config=kept | given | splits)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
