"""Every figure of the report: which numbers it shows and what is said of them; without its numbers there is none."""

from collections.abc import Iterator
from functools import partial

from instructgpt_jax.report import ablations, drawing, toxicity, words
from instructgpt_jax.report.drawing import Row, Scale
from instructgpt_jax.report.style import HEIGHT, Figure, Panel

NAMES = (
    "figure1_win_rate",
    "figure3_win_rate_by_group",
    "likert",
    "figure5_likert_flan_t0",
    "figure4_metadata",
    "scores",
    "alignment_tax",
    "reward_model",
    "overoptimisation",
    "curves",
    *ablations.NAMES,
    "truthfulqa",
    "toxicity",
    "bias",
    "benchmarks",
    toxicity.NAME,
)
CURVES = (  # (title, key on training batches, key on validation data, step, unit)
    ("Pretraining: loss", "pretrain/loss", "pretrain/valid_loss", "step", "nats a token"),
    ("Fine-tuning: loss", "sft/loss", "sft/valid_loss", "step", "nats a token"),
    ("Reward model: loss", "reward/loss", "reward/valid_loss", "step", "nats a pair"),
    ("Reward model: accuracy", "reward/accuracy", "reward/valid_accuracy", "step", "share of pairs"),
    ("PPO: score", "objective/score", "valid/score", "iteration", "mean of the responses"),
    ("PPO: KL from the reference", "objective/kl", "valid/kl", "iteration", "nats a response"),
    ("PPO: length", "response/length", "valid/length", "iteration", "tokens a response"),
    ("PPO: pretraining loss", "ptx/loss", "", "iteration", "nats a token"),
    ("PPO: value loss", "value/loss", "", "iteration", "half a squared error"),
    ("PPO: entropy of the policy", "policy/entropy", "", "iteration", "nats a token"),
)
BARS = "Bars are 95 % intervals."
BENCHMARKS = {  # key of `benchmark_figures` -> (name, title, what is said)
    "truthfulqa": (
        "truthfulqa",
        "TruthfulQA",
        "Share of answers that the graders find true, and true and informative: what the paper's figure 6 shows. MC1 "
        "and MC2 are the multiple choice of the same questions.",
    ),
    "toxicity": (
        "toxicity",
        "Toxicity by prompt",
        "Mean probability that a continuation is toxic, as the grader has it; lower is better: the paper's figure 7.",
    ),
    "bias": (
        "bias",
        "Bias by prompt",
        "Entropy in bits of the choice between the two sentences of a pair: 1 is no preference, 0 a sure one; the "
        "paper's figure 32.",
    ),
    "tax": (
        "benchmarks",
        "Public benchmarks: the alignment tax",
        "What PPO costs on public tasks, and what the pretraining gradients of PPO-ptx keep: the paper's figures 28 "
        "and 29; higher is better.",
    ),
}


def all_figures(report: dict) -> list[Figure]:
    """The figures that the report has numbers for, in the order of `NAMES`."""
    makers = (preferences, metadata, scores, tax, reward_model, overoptimisation, curves, ablations.figures)
    makers += (benchmarks, toxicity.figures)
    return [figure for maker in makers for figure in maker(report)]


def preferences(report: dict) -> Iterator[Figure]:
    """Win rates and ratings by model size: the paper's figures 1, 3, 5 and 31."""
    judged = words.measured(report, "win_rate")
    if judged:
        baseline = words.model_names(report)[report["baseline"]]
        caption = (
            f"How often {words.name(judged[0][1], words.GROUPS)} prefer{'s' * (judged[0][1] in words.MACHINES)} a "
            f"model's response to that of {baseline}, on "
            f"{words.name(judged[0][0], words.DISTRIBUTIONS)}: the form of the paper's figure 1. A tie counts half, so "
            f"the dashed line, 50 %, is the baseline itself. {BARS}"
        )
        yield _by_size(report, "figure1_win_rate", "Win rate by model size", caption, judged[:1])
    if len(judged) > 1:
        heldout = "Held-out labelers made none of the comparisons that the reward model learned from. "
        caption = (
            "The same by kind of prompt and by labeler: the form of the paper's figure 3. "
            f"{heldout if any(group == 'heldout' for _, group in judged) else ''}{BARS}"
        )
        yield _by_size(report, "figure3_win_rate_by_group", "Win rate by prompts and labelers", caption, judged)
    rated = words.measured(report, "likert")
    if rated:
        caption = f"Mean rating of the responses from 1 (worst) to 7 (best): the paper's figure 31. {BARS}"
        yield _by_size(report, "likert", "Ratings on the Likert scale", caption, rated)
        yield from _beside_public_tasks(report, *rated[0])


def _beside_public_tasks(report: dict, distribution: str, group: str) -> Iterator[Figure]:
    """The paper's figure 5: ratings of the models of one size, where baselines of public tasks are among them."""
    found, models = report["results"][distribution], report["models"]
    sizes = {model["size"] for model in models.values() if model["method"] in ("flan", "t0")}
    names = [name for name, model in models.items() if model["size"] in sizes and model["method"] != "control"]
    values = {name: found[name]["likert"][group] for name in names if group in found[name].get("likert", {})}
    if not any(models[name]["method"] in ("flan", "t0") for name in values):
        return
    where = f"{words.name(distribution, words.DISTRIBUTIONS)}, {words.name(group, words.GROUPS)}"
    caption = (
        "Mean rating of the responses from 1 (worst) to 7 (best) beside FLAN and T0, which were fine-tuned on closed "
        f"tasks worded as instructions and not on what users ask for: what the paper's figure 5 shows. {BARS}"
    )
    panel = _models(report, where, values, Scale("mean rating, 1 to 7", limits=(0.9, 7.1)))
    yield Figure("figure5_likert_flan_t0", "FLAN and T0: public tasks as instructions", caption, [panel])


def metadata(report: dict) -> Iterator[Figure]:
    """The paper's figure 4: prevalence of each property, on the first distribution that has it."""
    for distribution in words.distributions(report):
        found = report["results"][distribution]
        panels, never = [], []
        for key in words.ordered({key for row in found.values() for key in row.get("metadata", {})}, words.METADATA):
            values = {name: row["metadata"][key] for name, row in found.items() if key in row.get("metadata", {})}
            if key in words.OPPOSITES:
                values = {name: words.opposite(value) for name, value in values.items()}
            title = words.name(key, words.METADATA | words.OPPOSITES)
            if any(value["mean"] > 0 for value in values.values()):
                panels.append(_models(report, title, values, Scale("", share=True), bars=True))
            else:
                never.append(title[:1].lower() + title[1:])
        if panels:
            caption = (
                f"Share of responses with each property, on {words.name(distribution, words.DISTRIBUTIONS)}: what the "
                "paper's figure 4 shows. Constraints count only where a prompt has one, hallucinations only where the "
                "answer must come from the prompt. Thin bars are 95 % intervals."
            ) + (f" Noted of no response: {', '.join(never)}." if never else "")
            yield Figure("figure4_metadata", "What is noted about the responses", caption, panels, columns=3)
            return


def scores(report: dict) -> Iterator[Figure]:
    """Scores of the responses and their likeness to human references, on the main distribution."""
    for distribution in words.distributions(report):
        found, panels, said = report["results"][distribution], [], []
        for key in ("score", "judge", "gold", "slot_coverage", "bleu", "rouge_l"):
            title, form, note = words.METRICS[key]
            values = {model: row[key] for model, row in found.items() if key in row}
            if values:
                title = title.split(",")[0]
                panels.append(_models(report, title, values, Scale("higher is better", form == "share")))
                said.append(f"{title}: {note}.")
        if panels:
            where = words.name(distribution, words.DISTRIBUTIONS)
            caption = f"Means over the responses to {where}. {' '.join(said)} {BARS}"
            yield Figure("scores", "Scores of the responses", caption, panels, columns=3)
            return


def tax(report: dict) -> Iterator[Figure]:
    """The alignment tax: pretraining loss and closed tasks of each model."""
    language, panels = report.get("language", {}), []
    losses = {name: row["pretraining_loss"] for name, row in language.items() if "pretraining_loss" in row}
    if losses:
        panels.append(_models(report, "Loss on pretraining text", losses, Scale("nats a token; lower is better")))
    for task in dict.fromkeys(task for row in language.values() for task in row.get("tasks", {})):
        values = {name: row["tasks"][task] for name, row in language.items() if task in row.get("tasks", {})}
        chance = report.get("chance", {}).get(task)
        title = f"Task: {words.name(task)}" + (f", chance is {100 * chance:.3g} %" if chance is not None else "")
        panels.append(_models(report, title, values, Scale("right answers; higher is better", share=True, mark=chance)))
    caption = (
        "What learning from preferences costs elsewhere: the loss on held-out pretraining text, and closed tasks, "
        "answered by the choice whose log-probability, summed over its tokens, is the highest; the dashed line is "
        "chance. The table has them by the mean per token too, the paper's rule. PPO-ptx mixes pretraining "
        f"gradients into PPO to keep what the base model knew. {BARS}"
    )
    if panels:
        yield Figure("alignment_tax", "Alignment tax", caption, panels, columns=3)


def reward_model(report: dict) -> Iterator[Figure]:
    """Accuracy by labeler group beside the labelers' own agreement, and calibration."""
    found, panels, legend = report.get("reward_model", {}), [], []
    accuracy, agreement = found.get("accuracy", {}), found.get("agreement", {})
    if accuracy:
        rows = []
        for group in words.ordered(accuracy | agreement, words.GROUPS):
            points = [("sft", accuracy[group])] if group in accuracy else []
            points += [("ink", _interval(agreement[group]))] if group in agreement else []
            rows.append(Row(words.name(group, words.GROUPS), points))
        scale = Scale("share of pairs; the dashed line is chance", share=True, mark=0.5)
        panels.append(Panel("Pairs ranked as the labeler ranked them", partial(drawing.rows, rows=rows, scale=scale)))
        legend = [words.Line("accuracy", "sft"), words.Line("agreement of two labelers", "ink")][: 1 + bool(agreement)]
    if found.get("calibration"):
        panels.append(Panel("Calibration", partial(drawing.calibration, bins=found["calibration"])))
    caption = (
        "How well the reward model predicts rankings that it never saw. Accuracy is the share of untied pairs that it "
        "puts in the labeler's order; two labelers agree as often as the diamonds say, and a model can hardly do "
        "better. Calibration is the predicted probability that a response is preferred, against how often it was; "
        f"larger points are more pairs. {BARS}"
    )
    if panels:
        yield Figure("reward_model", "The reward model", caption, panels, legend)


def overoptimisation(report: dict) -> Iterator[Figure]:
    """Score, judge and gold score along PPO, against the distance from the reference policy."""
    runs = {name: rows for name, rows in report.get("overoptimisation", {}).items() if rows}
    runs = {name: sorted(rows, key=lambda row: row["step"]) for name, rows in runs.items()}
    looks, panels, peak = _looks(report, list(runs)), [], ""
    for key, title in {"score": "Score that PPO raises", "judge": "Independent judge", "gold": "Gold score"}.items():
        have = {name: [(words.mean(r["kl"]), r[key]) for r in runs[name] if key in r] for name in looks}
        have = {name: points for name, points in have.items() if points}
        if have:
            drawn = [(looks[name], points, True) for name, points in have.items()]
            across, up = "KL from the reference, nats a response", "mean of the responses"
            panels.append(Panel(title, partial(drawing.curves, drawn=drawn, across=across, up=up)))
        if have and key == "gold":
            peaks = {name: max(points, key=lambda point: words.mean(point[1])) for name, points in have.items()}
            best = [f"{looks[name].label} at {words.number(kl)} nats" for name, (kl, _) in peaks.items()]
            peak = f" Here the gold score is highest for {', '.join(best)}."
    caption = (
        "Is the reward model still right about what PPO finds? Each point is a snapshot of a policy: its mean score "
        "against its KL from the reference policy. Where the score rises and the gold score or the judge does not, PPO "
        f"has learned to please the reward model only.{peak}"
    )
    if panels:
        yield Figure("overoptimisation", "Score against KL", caption, panels, list(looks.values()), 3)


def curves(report: dict) -> Iterator[Figure]:
    """Training curves: a panel for each loss and accuracy of the supervised stages, and for each quantity of PPO."""
    stages = {stage: report["curves"][stage] for stage in words.ordered(report.get("curves", {}), words.STAGES)}
    looks, panels, shown = _looks(report, list(stages)), [], set()
    for title, train, valid, across, up in CURVES:
        drawn = []
        for stage, found in stages.items():
            look = looks[stage]
            if found.get(train):
                drawn.append((look, found[train], False))
                look = look._replace(dashes=2)
            if found.get(valid):
                drawn.append((look, found[valid], True))
            shown |= {stage} if found.get(train) or found.get(valid) else set()
        if drawn:
            panels.append(Panel(title, partial(drawing.curves, drawn=drawn, across=across, up=up)))
    caption = (
        "Every stage as it trained. A step is an optimiser update; an iteration of PPO is one batch of episodes. Lines "
        "are values on training batches, points are values on validation data."
    )
    if panels:
        legend = [looks[stage] for stage in stages if stage in shown]
        yield Figure("curves", "Training curves", caption, panels, legend, 3)


def benchmarks(report: dict) -> Iterator[Figure]:
    """The paper's public benchmarks: a panel for each task, prompts or shots side by side."""
    for key, bars in report.get("benchmark_figures", {}).items():
        name, title, said = BENCHMARKS[key]
        panels = []
        for bar in bars:
            found = report["benchmarks"][bar["task"]]
            values = {model: row[bar["metric"]] for model, row in found.items() if bar["metric"] in row}
            above = ", ".join(text for text in (bar["title"], bar["label"]) if text)
            form, metric = words.benchmark(bar["metric"]), words.name(bar["metric"], words.BENCHMARKS)
            scale = Scale(f"{metric}, n = {report['benchmark_tasks'][bar['task']]['n']:,}", share=form == "share")
            panels.append(_models(report, above, values, scale, bars=True))
        columns = min(3, max(2, len({bar["label"] for bar in bars if bar["label"]})))
        yield Figure(name, title, f"{said} {BARS.replace('Bars', 'Thin bars')}", panels, columns=columns)


def _by_size(report: dict, name: str, title: str, caption: str, where: list[tuple[str, str]]) -> Figure:
    """A panel for each distribution and labeler group, all on one scale; with a single size, one row a model."""
    results, quantity = report["results"], "likert" if name == "likert" else "win_rate"
    found = [
        {model: row[quantity][group] for model, row in results[distribution].items() if group in row.get(quantity, {})}
        for distribution, group in where
    ]
    names = [model for model in report["models"] if any(model in values for values in found)]
    lines, sizes = words.lines(report, names), words.sizes(report, names)
    sizes = {size: f"{size}\n{words.parameters(count)}" if count else size for size, count in sizes.items()}
    scale = Scale("mean rating, 1 to 7", limits=(0.9, 7.1))
    if quantity == "win_rate":
        top = max(value["high"] for values in found for value in values.values())
        label = f"win rate against {report['models'][report['baseline']]['label']}"
        scale = Scale(label, True, (0, min(1.02, max(0.6, 1.06 * top))), 0.5)
    panels = []
    for (distribution, group), values in zip(where, found, strict=True):
        above = f"{words.name(distribution, words.DISTRIBUTIONS)}, {words.name(group, words.GROUPS)}"
        draw = partial(drawing.by_size, lines=lines, sizes=sizes, values=values, scale=scale)
        panels.append(Panel(above, draw) if len(sizes) > 1 else _models(report, above, values, scale))
    return Figure(name, title, caption, panels, lines if len(sizes) > 1 else ())


def _models(report: dict, title: str, values: dict[str, dict | float], scale: Scale, bars: bool = False) -> Panel:
    """A row for each model, in the report's order, then for others, like the start of PPO."""
    names, tints = words.STAGES | words.model_names(report), words.colors(report)
    order = words.ordered(values, report["models"])
    rows = [Row(words.name(name, names), [(tints.get(name, "muted"), _interval(values[name]))]) for name in order]
    draw = partial(drawing.rows, rows=rows, scale=scale, bars=bars)
    return Panel(title, draw, max(HEIGHT, 0.9 + 0.38 * len(rows)))


def _interval(value: dict | float) -> dict:
    """A plain number has no width."""
    return value if isinstance(value, dict) else {"mean": value, "low": value, "high": value}


def _looks(report: dict, stages: list[str]) -> dict[str, words.Line]:
    """How each stage is drawn: like the model of its name, else like the method that its name says."""
    tints, names = words.colors(report), words.STAGES | words.METHODS | words.model_names(report)
    found, used, spare = {}, {}, 0
    for stage in stages:
        last = stage.rsplit("/", 1)[-1]
        tint = tints.get(stage) or tints.get(last) or (last if last in words.METHODS else "")
        if not tint:
            tint, spare = f"extra{1 + spare % 3}", spare + 1
        used[tint] = used.get(tint, -1) + 1
        found[stage] = words.Line(words.name(stage, names), tint, used[tint])
    return found
