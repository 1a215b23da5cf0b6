"""Model cards: what `card.md.jinja` says of a network, of a pipeline, made of their workdirs alone.

Sections are those of the paper's own model card (github.com/openai/following-instructions-human-feedback), the head is
what the Hugging Face Hub reads. A section that the workdirs have nothing for says so.
"""

import os
import re
from collections.abc import Sequence

import jinja2
from etils import epath

from instructgpt_jax.report import lineage, page, words

FILE = "model_card.md"
PETAFLOP_DAYS = 1e15 * 86_400  # FLOPs
PAPER = {"sft": 4.9, "ppo": 60.0}  # petaflop/s-days of the paper's 175B models, section 5.1
HUB = re.compile(r"[\w.-]+/[\w.-]+")
KINDS = {"pretraining": "text", "held_out": "held-out comparisons"}


def of_network(init_from: str, head: str) -> str:
    """The card of one exported network.

    Args:
      init_from: what was exported: a workdir, a checkpoint in one, a directory or a Hub id.
      head: 'lm' or 'scalar'.
    """
    found = lineage.of_network(init_from)
    workdir = found.runs[-1].workdir if found.runs else epath.Path(init_from)
    name = f"{workdir.parent.name}/{workdir.name}" if found.runs else workdir.name
    return _render(name, found, head)


def of_pipeline(workdir: epath.PathLike, names: Sequence[str]) -> str:
    """The card of all that the stages of a pipeline have trained; `names` in their order."""
    return _render(epath.Path(workdir).name, lineage.of_pipeline(workdir, names), "")


def _render(name: str, found: lineage.Found, head: str) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("instructgpt_jax", "report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"table": _table, "code": _code}
    reports = [words.visible(report) for report in found.reports]
    text = environment.get_template("card.md.jinja").render(
        head=head,
        name=name,
        metadata=_metadata(found, head),
        bases=found.bases,
        networks=[_network(run) for run in found.runs],
        data=_data(found.runs),
        groups=_groups(found.runs),
        judges=[text for text in map(page.judges, reports) if text],
        agreement=[table for table in map(_agreement, reports) if table[1]],
        folds=[table for report in reports if (table := page.folds(report.get("folds", {})))[1]],
        training=_training(found.runs),
        software=_software(found.runs),
        paper=PAPER,
        evaluations=[part for report in reports for part in _evaluations(report)],
        scores=[part for scores in found.scores for part in _scores(scores)],
        benchmarks=[table for table in (page.benchmarks(r, words.model_names(r)) for r in reports) if table[1]],
        limits=_limits(found),
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def _metadata(found: lineage.Found, head: str) -> dict[str, list[str] | str]:
    """What the Hub reads. Values are JSON, and so YAML; what is no name on the Hub is left out."""
    sources = [source for run in found.runs for kind in run.data for source in _sources(run, kind)]
    sets = [source.removeprefix("hf:").split(":")[0] for source in sources if source.startswith("hf:")]
    public = {
        "base_model": list(filter(_on_hub, found.bases)),
        "datasets": list(dict.fromkeys(filter(_on_hub, sets))),
    }
    task = {"lm": "text-generation", "scalar": "text-classification"}.get(head)
    return (
        {"library_name": "transformers"}
        | ({"pipeline_tag": task} if task else {})
        | {key: names for key, names in public.items() if names}
        | {"tags": ["instructgpt", "rlhf", "reward-model" if head == "scalar" else "ppo"]}
    )


def _on_hub(name: str) -> bool:
    return HUB.fullmatch(name) is not None and not os.path.exists(name)


def _network(run: lineage.Run) -> str:
    """A stage's network in words."""
    entry = run.config["models"].get("model") or run.config["models"].get("policy")
    shape = entry.get("architecture") or {}
    size = (
        f"{shape['num_layers']} layers, width {shape['width']}, {shape['num_heads']} heads, vocabulary "
        f"{shape['vocab_size']:,}, context {shape['max_length']:,} tokens"
        if shape
        else "size unknown"
    )
    start = entry.get("init_from") or ""
    return f"`{run.name}` ({run.config['stage']}): {size}; from {_code(start) if start else 'fresh parameters'}"


def _code(path: str) -> str:
    """A path or source as it may stand in public: without the folders above the last two names."""
    form, colon, place = path.rpartition(":") if "://" not in path else ("", "", path)
    short = "/".join(["…", *place.split("/")[-2:]]) if place.count("/") > 1 else place
    return f"`{form}{colon}{short}`"


def _sources(run: lineage.Run, kind: str) -> list[str]:
    return list(run.config["data"].get(kind, ()))


def _data(runs: Sequence[lineage.Run]) -> tuple[list[str], list[list[str]]]:
    """A row for each kind of data of each stage."""
    rows = []
    for run in runs:
        for kind, read in run.data.items():
            left_out = "; ".join(f"{count:,} {why}" for why, count in read.get("left_out", {}).items())
            sources = ", ".join(map(_code, _sources(run, kind)))
            counts = [f"{read.get(key, 0):,}" for key in ("records", "examples", "validation")]
            row = [run.name, words.name(kind, KINDS), sources, *counts, left_out, f"`{read['fingerprint'][:12]}`"]
            rows.append(row)
    return ["stage", "kind", "sources", "records", "trained on", "held out", "left out", "hash"], rows


def _groups(runs: Sequence[lineage.Run]) -> tuple[list[str], list[list[str]]]:
    """Comparisons by labeler group, of each stage whose comparisons name one."""
    rows = [
        [run.name, words.name(group, words.GROUPS), f"{count:,}"]
        for run in runs
        for read in run.data.values()
        for group, count in read.get("groups", {}).items()
    ]
    return ["stage", "labelers", "comparisons"], rows


def _agreement(report: dict) -> tuple[list[str], list[page.Row]]:
    """How often labelers agree with each other, and the reward model with them, by group."""
    found = {key: values for key, values in report.get("reward_model", {}).items() if key in ("accuracy", "agreement")}
    groups = {group for values in found.values() for group in values}
    return page.table({name: {key: found[key].get(name) for key in found} for name in groups}, words.GROUPS)


def _training(runs: Sequence[lineage.Run]) -> tuple[list[str], list[list[str]]]:
    """What each stage has cost, and all of them."""
    rows, flops, seconds = [], 0.0, 0.0
    for run in runs:
        step, planned, spent = run.saved.get("step"), run.saved.get("num_steps"), run.saved.get("spent")
        if run.config["stage"] == "select":
            rows.append([run.name, f"chose step {step}" if step is not None else "–", *["–"] * 5])
            continue
        steps = f"{step:,}" if step is not None else "not recorded"
        steps += f" of {planned:,}" if step is not None and planned and planned > step else ""
        if spent is None:
            rows.append([run.name, steps, *["not recorded"] * 5])
            continue
        steps += f", counted from step {spent['from_step']:,}" if spent["from_step"] else ""
        flops, seconds = flops + spent["flops"], seconds + spent["seconds"]
        rows.append([run.name, steps, f"{spent['tokens']:,.0f}", *_cost(spent["flops"], spent["seconds"]),
                     ", ".join(spent["devices"])])  # fmt: skip
    if len(rows) > 1 and flops:
        rows.append(["all", "", "", *_cost(flops, seconds), ""])
    return ["stage", "steps", "tokens", "model FLOPs", "petaflop/s-days", "hours", "hardware"], rows


def _cost(flops: float, seconds: float) -> list[str]:
    return [f"{flops:.3g}", f"{flops / PETAFLOP_DAYS:.3g}", f"{seconds / 3600:.3g}"]


def _software(runs: Sequence[lineage.Run]) -> list[str]:
    """The versions that stages ran with; one line where all ran with the same."""
    found: dict[str, list[str]] = {}
    for run in runs:
        versions = (run.saved.get("spent") or {}).get("versions")
        if versions:
            found.setdefault(", ".join(f"{name} {number}" for name, number in versions.items()), []).append(run.name)
    return [text if len(found) == 1 else f"{', '.join(names)}: {text}" for text, names in found.items()]


def _evaluations(report: dict) -> list[tuple[str, list[str], list[page.Row]]]:
    """Title, columns and rows of each table of a report."""
    names, found = words.model_names(report), []
    for name in words.distributions(report):
        number = report.get("distributions", {}).get(name, {}).get("n")
        title = words.DISTRIBUTIONS.get(name, name) + (f", n = {number:,}" if number else "")
        found.append((title, *page.table(report["results"][name], names)))
    found += [(f"Preferred to, {title}", *rest) for title, *rest in page.head_to_head(report, names)]
    if report.get("language"):
        found.append(("Language", *page.table(report["language"], names | words.STAGES | names)))
    return found


def _scores(scores: dict) -> list[tuple[str, list[str], list[page.Row]]]:
    """Reward models on held-out comparisons: accuracy by source."""
    models = list(dict.fromkeys(name for row in scores.values() for name in row))
    rows = []
    for source, row in scores.items():
        label = "all" if source == "all" else _code(source)
        rows.append(page.Row(label, [row.get(name, {}).get("accuracy") for name in models], "share"))
    return [("Reward models on held-out comparisons, accuracy in % of pairs", [words.name(m) for m in models], rows)]


def _limits(found: lineage.Found) -> list[str]:
    """What of the limits is this model's own."""
    limits = []
    for run in found.runs:
        ppo = run.config.get("ppo")
        if ppo:
            prompt, response = ppo["max_prompt_length"], ppo["response_length"]
            limits.append(f"`{run.name}` saw prompts of up to {prompt:,} tokens, and answers of up to {response:,}.")
    sources = [source for run in found.runs for kind in run.data for source in _sources(run, kind)]
    if any(source.startswith("simulated:") for source in sources):
        limits.append("Its data, users or labelers are simulated: nothing in this card is a statement about people.")
    if found.reports and not any(report.get("people") for report in found.reports):
        limits.append("No person has judged its answers in the evaluation above.")
    return limits


def _table(table: tuple[Sequence[str], Sequence]) -> str:
    """Columns and rows, texts or `page.Row`s, as a table of Markdown."""
    columns, rows = table
    lines = []
    for row in rows:
        if not isinstance(row, page.Row):
            lines.append(row)
            continue
        cells = [words.cell(value, row.form) for value in row.values]
        texts = [f"{mean} ({interval})" if interval else mean for mean, interval in cells]
        lines.append([row.label, *texts] if row.values else [f"**{row.label}**", *[""] * len(columns)])
    heads = columns if rows and not isinstance(rows[0], page.Row) else ["", *columns]
    written = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in [heads, *lines]]
    written.insert(1, ["---"] * len(heads))
    return "\n".join(f"| {' | '.join(line)} |" for line in written)
