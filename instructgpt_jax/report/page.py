"""The report as one page of HTML: what `page.html.jinja` shows beside the figures and the report itself."""

from collections.abc import Sequence
from typing import NamedTuple

import jinja2

from instructgpt_jax.report import ablations, findings, style, words

GROUPED = (  # intervals by name
    "win_rate", "likert", "metadata", "toxicity", "relative_toxicity", "continuity", "tasks",
    "tasks_per_token",
)  # fmt: skip


PAPERS_FOLDS = (  # section 4.1: five groups of labelers, three seeds; it does not say what ± is
    {"mean": 0.724, "low": 0.720, "high": 0.728},
    {"mean": 0.696, "low": 0.687, "high": 0.705},
)


class Row(NamedTuple):
    """A line of a table: a value for each column and how it is written, see `words.cell`; a heading has no values."""

    label: str
    values: Sequence = ()
    form: str = "number"


def render(report: dict, figures: Sequence[style.Figure]) -> str:
    """The page, with every figure as inline SVG."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("instructgpt_jax", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"glue": _glue, "cell": words.cell}
    names, reward = words.model_names(report), report.get("reward_model", {})
    reward = {key: reward[key] for key in ("accuracy", "agreement") if reward.get(key)}
    groups = {group for values in reward.values() for group in values}
    return environment.get_template("page.html.jinja").render(
        report=report,
        figures={figure.name: figure for figure in figures},
        facts=facts(report),
        headline=findings.headline(report),
        findings=findings.findings(report),
        judges=judges(report),
        judged_by=words.by(next((group for _, group in words.measured(report, "win_rate")), "")),
        tables=head_to_head(report, names),
        results={name: table(report["results"][name], names) for name in words.distributions(report)},
        quantities={key for rows in report.get("results", {}).values() for row in rows.values() for key in row},
        language=table(report.get("language", {}), names | words.STAGES | names),
        benchmarks=benchmarks(report, names),
        prompts=prompt_sets(report.get("prompt_sets", {})),
        folds=folds(report.get("folds", {})),
        sweeps=ablations.NAMES,
        swept=swept(report.get("sweeps", {})),
        agreement=table({g: {key: reward[key].get(g) for key in reward} for g in groups}, words.GROUPS),
        samples=in_turn(report),
        about=about(report),
        names=names,
        tints=words.colors(report),
        style=style,
        words=words,
    )


def facts(report: dict) -> str:
    """What was measured, in a line."""
    sizes, found = report.get("distributions", {}), []
    for name in words.ordered(sizes, words.DISTRIBUTIONS):
        found.append(f"{sizes[name]['n']:,} held-out {words.DISTRIBUTIONS.get(name, f'prompts ({name})')}")
    said = f"Measured on {' and '.join(found)}. ± is half of a 95 % interval. " if found else ""
    return f"{said}Seed {report['seed']}." if "seed" in report else said


def judges(report: dict) -> str:
    """Which people judged the answers, how much, and how far they agree; '' where none did."""
    found = report.get("people")
    if not found:
        return ""
    names, shares = words.GROUPS | {"all": "labelers"}, found["agreement"]
    crowd = []
    for group in words.ordered(found["labelers"], words.GROUPS):
        count, name = found["labelers"][group], words.name(group, names)
        crowd.append(name if group in words.MACHINES else f"{count:,} {name[: -1 if count == 1 else None]}")
    said = (
        f"Judged by {' and '.join(crowd) or 'labelers'}: {found['rankings']:,} rankings and {found['ratings']:,} "
        f"ratings of responses to {found['prompts']:,} prompts."
    )
    agreed = []
    for group in words.ordered(shares, words.GROUPS):
        two = [words.name(one, names) for one in group.split(" and ")]
        who = f"two {two[0]}" if len(two) == 1 else f"one of the {two[0]} and one of the {two[1]}"
        agreed.append(f"{who} prefer the same in {words.percent(shares[group])}")
    return said + (f" Of the pairs that neither calls equal {'; '.join(agreed)}." if agreed else "")


def head_to_head(report: dict, names: dict[str, str]) -> list[tuple[str, list[str], list[Row]]]:
    """Of each distribution and group of judges a title, columns and rows: how often a row is preferred to a column."""
    found = []
    for distribution in words.ordered(report.get("head_to_head", {}), words.DISTRIBUTIONS):
        groups = report["head_to_head"][distribution]
        for group in words.ordered(groups, words.GROUPS):
            order = [name for name in report["models"] if name in groups[group]]
            rows = [Row(names[a], [groups[group][a].get(b) for b in order], "share") for a in order]
            title = f"{words.name(distribution, words.DISTRIBUTIONS)}, {words.name(group, words.GROUPS)}"
            found.append((title, [names[name] for name in order], rows))
    return found


def table(columns: dict[str, dict], names: dict[str, str]) -> tuple[list[str], list[Row]]:
    """The labels of the columns, in the order of the names, and a row for each quantity that any of them has."""
    columns, rows, grouped = {name: columns[name] for name in words.ordered(columns, names)}, [], False
    for key in words.ordered(dict.fromkeys(key for column in columns.values() for key in column), words.METRICS):
        label, form, _ = words.METRICS.get(key, (words.name(key), "number", ""))
        values = [column.get(key) for column in columns.values()]
        if key in GROUPED:
            rows.append(Row(label))
            for name in dict.fromkeys(name for value in values for name in value or {}):
                inner = [(value or {}).get(name) for value in values]
                rows.append(Row(words.name(name, words.GROUPS | words.METADATA), inner, form))
        else:
            rows += [Row("Scores and text")] if grouped else []
            rows.append(Row(label, values, form))
        grouped = key in GROUPED
    return [words.name(name, names) for name in columns], rows


def benchmarks(report: dict, names: dict[str, str]) -> tuple[list[str], list[Row]]:
    """The labels of the models, and a row for each number of each public task; their n, and what was cut, above it."""
    found, rows = report.get("benchmarks", {}), []
    models = [name for name in names if any(name in row for row in found.values())]
    for task, row in found.items():
        about = report["benchmark_tasks"][task]
        cut = [f"{names[name]} {count:,}" for name, count in about["cut"].items() if count]
        said = f"{task}, n = {about['n']:,}" + (f"; contexts cut from the left: {', '.join(cut)}" if cut else "")
        rows.append(Row(said))
        for metric in dict.fromkeys(metric for numbers in row.values() for metric in numbers):
            form = words.benchmark(metric)
            label = words.name(metric, words.BENCHMARKS) + ", %" * (form == "share")
            rows.append(Row(label, [row.get(name, {}).get(metric) for name in models], form))
    return [names[name] for name in models], rows


def prompt_sets(found: dict) -> list[tuple[str, list[str], list[Row]]]:
    """Title, columns and rows of what each step of stage `prompts` dropped, and of the paper's tables 6 and 8 to 11."""
    if not found:
        return []
    tables, steps = found["tables"], found["steps"]
    dropped = [Row("left out", [step["dropped"] for step in steps], "whole")]
    dropped.append(Row("left", [step["left"] for step in steps], "whole"))
    splits = list(tables["sizes"])
    sources = dict.fromkeys(source for row in tables["sizes"].values() for source in row)
    sized = [Row(f"prompts{'' if source == 'total' else f', {source}'}",
                 [tables["sizes"][name].get(source) for name in splits], "whole") for source in sources]  # fmt: skip
    sized.append(Row("prompts per user", [tables["prompts_per_user"].get(name) for name in splits]))
    demonstrations = {
        f"{what}{f', {source}' if source else ''}": row
        for what, rows in tables["lengths_of_demonstrations"].items()
        for source, row in rows.items()
    }
    cases = {words.name(name) or "none named": row for name, row in tables["lengths_by_use_case"].items()}
    sized += _lengths(tables["lengths"], splits)
    made = [
        ("What each step left out", [step["step"] for step in steps], dropped),
        ("Prompts by split; lengths in tokens (tables 6, 8 and 9)", splits, sized),
        ("Lengths by use case, all splits (table 10)", list(cases), _lengths(cases, cases)),
        ("Few-shot instructions as demonstrations (table 11)", list(demonstrations),
         _lengths(demonstrations, demonstrations)),
    ]  # fmt: skip
    return [one for one in made if one[1]]


def _lengths(columns: dict[str, dict[str, float]], names: Sequence[str]) -> list[Row]:
    """A row for each number of prompt_tables.described."""
    quantities = dict.fromkeys(key for column in columns.values() for key in column)
    forms = {"mean": "number", "std": "number"}
    return [Row(key, [columns.get(name, {}).get(key) for name in names], forms.get(key, "whole")) for key in quantities]


def folds(found: dict) -> tuple[list[str], list[Row]]:
    """Of stage `reward` with folds: accuracy on labelers seen and unseen in training, here and in the paper."""
    if not found:
        return [], []
    rows = [
        Row("labelers seen in training, % of pairs", [found["training_groups"], PAPERS_FOLDS[0]], "share"),
        Row("labelers unseen", [found["held_out_groups"], PAPERS_FOLDS[1]], "share"),
        Row("unseen less seen, points", [found["difference"], None], "share"),
    ]
    return ["this run", "the paper"], rows


def swept(found: dict) -> list[tuple[str, list[str], list[Row]]]:
    """Title, columns and rows of each sweep: every number of its points."""
    tables = []
    for name, run in found.get("runs", {}).items():
        points = [{key: value for key, value in point.items() if isinstance(value, dict)} for point in run["points"]]
        rows = []
        for key in words.ordered(dict.fromkeys(key for point in points for key in point), words.METRICS):
            label, form, _ = words.METRICS.get(key, (f"Task {words.name(key.removeprefix('task_'))}, %", "share", ""))
            rows.append(Row(label, [point.get(key) for point in points], form))
        title = f"{words.name(name)} ({run['key']}), {words.name(run['points'][0]['method'], words.METHODS)}"
        tables.append((title, [point["value"] for point in run["points"]], rows))
    return tables


def in_turn(report: dict) -> list[dict]:
    """The first sample of each distribution, then the second of each, and so on."""
    order, seen, places = words.distributions(report), {}, []
    for n, sample in enumerate(report.get("samples", [])):
        name = sample.get("distribution", "")
        seen[name] = seen.get(name, 0) + 1
        places.append((seen[name], order.index(name) if name in order else len(order), n))
    return [report["samples"][n] for _, _, n in sorted(places)]


def about(report: dict) -> dict[str, list[tuple[str, str]]]:
    """Small tables by title: models, times, versions."""
    perf, names = report.get("perf", {}), words.model_names(report)
    models = []
    for name, model in report["models"].items():
        count = f"{words.parameters(model['parameters'])} parameters" if model.get("parameters") else model["size"]
        models.append((names[name], count))
    times = [(words.name(stage), words.seconds(value)) for stage, value in perf.get("seconds", {}).items()]
    device = [("device", perf["device"])] if perf.get("device") else []
    return {"Models": models, "Time": times, "Versions": device + list(perf.get("versions", {}).items())}


def _glue(text: str) -> str:
    """A number stays with its unit and its interval."""
    return text.replace(" ±", "\u00a0±").replace("± ", "±\u00a0").replace(" %", "\u00a0%")
