"""Every figure of the report: which numbers it shows and what is said of them. Without its numbers a figure is None."""

from instructgpt_jax.report import drawing, words
from instructgpt_jax.report.style import Figure, Key, Panel, marker

NAMES = (
    "figure1_win_rate",
    "figure3_win_rate_by_group",
    "likert",
    "figure4_metadata",
    "scores",
    "alignment_tax",
    "reward_model",
    "overoptimisation",
    "curves",
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


def all_figures(report: dict) -> list[Figure]:
    """The figures that the report has numbers for, in the order of `NAMES`."""
    makers = (win_rates, win_rates_by_group, likert, metadata, scores, tax, reward_model, overoptimisation, curves)
    return [figure for maker in makers if (figure := maker(report)) is not None]


def win_rates(report: dict) -> Figure | None:
    """The paper's figure 1: win rate against the baseline by model size, on the main distribution and labelers."""
    where = _measured(report, "win_rate")
    if not where:
        return None
    baseline = words.model_names(report)[report["baseline"]]
    caption = (
        f"How often {words.group(where[0][1])} prefer a model's response to that of {baseline}, on "
        f"{words.distribution(where[0][0])}: the form of the paper's figure 1. A tie counts half, so the dashed line, "
        f"50 %, is the baseline itself. {BARS}"
    )
    panels = _by_size(report, where[:1], "win_rate")
    return Figure("figure1_win_rate", "Win rate by model size", caption, panels, _key(report, "win_rate"))


def win_rates_by_group(report: dict) -> Figure | None:
    """The paper's figure 3: the same by distribution and labeler group."""
    where = _measured(report, "win_rate")
    if len(where) < 2:
        return None
    heldout = "Held-out labelers made none of the comparisons that the reward model learned from. "
    caption = (
        "The same by kind of prompt and by labeler: the form of the paper's figure 3. "
        f"{heldout if any(group == 'heldout' for _, group in where) else ''}{BARS}"
    )
    title, panels = "Win rate by prompts and labelers", _by_size(report, where, "win_rate")
    return Figure("figure3_win_rate_by_group", title, caption, panels, _key(report, "win_rate"))


def likert(report: dict) -> Figure | None:
    """The paper's figures 5 and 31: mean rating from 1 to 7."""
    where = _measured(report, "likert")
    if not where:
        return None
    caption = f"Mean rating of the responses from 1 (worst) to 7 (best): the paper's figures 5 and 31. {BARS}"
    panels = _by_size(report, where, "likert")
    return Figure("likert", "Ratings on the Likert scale", caption, panels, _key(report, "likert"))


def metadata(report: dict) -> Figure | None:
    """The paper's figure 4: prevalence of each property, on the first distribution that has it."""
    for distribution in words.distributions(report):
        rows = report["results"][distribution]
        keys = {key for row in rows.values() for key in row.get("metadata", {})}
        if not keys:
            continue
        panels, sizes = [], words.sizes(report, list(rows))
        for key in words.ordered(keys, words.METADATA):
            values = {name: row["metadata"][key] for name, row in rows.items() if key in row.get("metadata", {})}
            draw = drawing.bars(words.lines(report, list(values)), sizes, values)
            panels.append(Panel(words.METADATA.get(key, words.plain(key)), draw))
        paler = f" Paler bars are smaller models: {', '.join(sizes)}." if len(sizes) > 1 else ""
        caption = (
            f"Share of responses with each property, on {words.distribution(distribution)}: the form of the paper's "
            "figure 4. Constraints count only where a prompt has one, hallucinations only where the answer must come "
            f"from the prompt.{paler} Thin bars are 95 % intervals."
        )
        return Figure("figure4_metadata", "What is noted about the responses", caption, panels, (), 3)
    return None


def scores(report: dict) -> Figure | None:
    """Scores of the responses and their likeness to human references, on the main distribution."""
    for distribution in words.distributions(report):
        rows, panels, shown = report["results"][distribution], [], []
        for key in ("score", "judge", "gold", "slot_coverage", "bleu", "rouge_l"):
            name, form, note = words.METRICS[key]
            found = _rows(report, {model: row[key] for model, row in rows.items() if key in row})
            if found:
                panels.append(Panel(name.split(",")[0], drawing.dots(found, "higher is better", form == "share", None)))
                shown.append(f"{name.split(',')[0]}: {note}.")
        if panels:
            where = f"Means over the responses to {words.distribution(distribution)}."
            caption = f"{where} {' '.join(shown)} {BARS}"
            return Figure("scores", "Scores of the responses", caption, panels, (), 3)
    return None


def tax(report: dict) -> Figure | None:
    """The alignment tax: pretraining loss and closed tasks of each model."""
    language, panels = report.get("language", {}), []
    losses = _rows(report, {n: row["pretraining_loss"] for n, row in language.items() if "pretraining_loss" in row})
    if losses:
        draw = drawing.dots(losses, "nats a token; lower is better", False, None)
        panels.append(Panel("Loss on pretraining text", draw))
    for task in dict.fromkeys(task for row in language.values() for task in row.get("tasks", {})):
        found = {name: row["tasks"][task] for name, row in language.items() if task in row.get("tasks", {})}
        values = _rows(report, found)
        draw = drawing.dots(values, "right answers; higher is better", True, report.get("chance", {}).get(task))
        panels.append(Panel(f"Task: {words.plain(task)}", draw))
    if not panels:
        return None
    chance = "The dotted line is chance. " if report.get("chance") else ""
    caption = (
        "What learning from preferences costs elsewhere: the loss on held-out pretraining text, and closed tasks, "
        f"answered by the choice with the highest log-probability. {chance}PPO-ptx mixes pretraining gradients into "
        f"PPO to keep what the base model knew. {BARS}"
    )
    return Figure("alignment_tax", "Alignment tax", caption, panels, (), 3)


def reward_model(report: dict) -> Figure | None:
    """Accuracy by labeler group beside the labelers' own agreement, and calibration."""
    found, panels, said, key = report.get("reward_model", {}), [], [], []
    accuracy, agreement = found.get("accuracy", {}), found.get("agreement", {})
    if accuracy:
        groups = [
            (words.group(group), accuracy.get(group), agreement.get(group))
            for group in words.ordered(accuracy | agreement, words.GROUPS)
        ]
        panels.append(Panel("Pairs ranked as the labeler ranked them", drawing.accuracy(groups)))
        said.append("Accuracy is the share of untied pairs that the reward model puts in the labeler's order.")
        if agreement:
            key = [Key("accuracy", "sft", marker("sft")), Key("agreement of two labelers", "ink", "D")]
            said.append("Diamonds are how often two labelers agree on a pair: a model can hardly do better.")
    if found.get("calibration"):
        panels.append(Panel("Calibration", drawing.calibration(found["calibration"])))
        said.append("Calibration is the predicted probability that a response is preferred, against how often it was.")
    if not panels:
        return None
    caption = f"How well the reward model predicts rankings that it never saw. {' '.join(said)} {BARS}"
    return Figure("reward_model", "The reward model", caption, panels, key)


def overoptimisation(report: dict) -> Figure | None:
    """Score, judge and gold score along PPO, against the distance from the reference policy."""
    runs = {name: rows for name, rows in report.get("overoptimisation", {}).items() if rows}
    runs = {name: sorted(rows, key=lambda row: row["step"]) for name, rows in runs.items()}
    looks, panels, best = _looks(report, list(runs)), [], []
    for key, title in {"score": "Score that PPO raises", "judge": "Independent judge", "gold": "Gold score"}.items():
        have = {n: [(words.mean(r["kl"]), r[key]) for r in rows if r.get(key) is not None] for n, rows in runs.items()}
        have = {name: points for name, points in have.items() if points}
        if have:
            panels.append(Panel(title, drawing.against_kl(have, looks)))
        if key == "gold":
            peaks = {name: max(points, key=lambda point: words.mean(point[1])) for name, points in have.items()}
            best = [f"{looks[name].label} at {words.number(kl)} nats" for name, (kl, _) in peaks.items()]
    if not panels:
        return None
    peak = f" Here the gold score is highest for {', '.join(best)}." if best else ""
    caption = (
        "Is the reward model still right about what PPO finds? Each point is a snapshot of a policy: its mean score "
        "against its KL from the reference policy. Where the score rises and the gold score or the judge does not, PPO "
        f"has learned to please the reward model only.{peak}"
    )
    return Figure("overoptimisation", "Score against KL", caption, panels, list(looks.values()), 3)


def curves(report: dict) -> Figure | None:
    """Training curves: a panel for each loss and accuracy of the supervised stages, and for each quantity of PPO."""
    stages = {stage: report["curves"][stage] for stage in words.ordered(report.get("curves", {}), words.STAGES)}
    looks, panels, shown = _looks(report, list(stages)), [], {}
    for title, train, valid, step, unit in CURVES:
        have = {stage: (found.get(train, []), found.get(valid, [])) for stage, found in stages.items()}
        have = {stage: pair for stage, pair in have.items() if any(pair)}
        if have:
            panels.append(Panel(title, drawing.training(have, looks, step, unit)))
            shown |= {stage: looks[stage] for stage in stages if stage in have}
    if not panels:
        return None
    caption = (
        "Every stage as it trained. A step is an optimiser update; an iteration of PPO is one batch of episodes. Lines "
        "are values on training batches, points are values on validation data."
    )
    return Figure("curves", "Training curves", caption, panels, list(shown.values()), 3)


def _measured(report: dict, quantity: str) -> list[tuple[str, str]]:
    """(distribution, labeler group) pairs that have the quantity for any model."""
    return [
        (distribution, group)
        for distribution in words.distributions(report)
        for group in words.group_names(report)
        if any(group in row.get(quantity, {}) for row in report["results"][distribution].values())
    ]


def _names(report: dict, quantity: str) -> list[str]:
    """The models that have the quantity anywhere."""
    rows = report.get("results", {}).values()
    return [name for name in report["models"] if any(quantity in row.get(name, {}) for row in rows)]


def _key(report: dict, quantity: str) -> list[Key]:
    lines = words.lines(report, _names(report, quantity))
    return [Key(line.label, line.color, marker(line.color), line.dashes) for line in lines]


def _by_size(report: dict, where: list[tuple[str, str]], quantity: str) -> list[Panel]:
    """A panel for each distribution and labeler group, all on one scale."""
    results, names = report["results"], _names(report, quantity)
    lines = words.lines(report, names)
    sizes = [(size, _size_label(report, size)) for size in words.sizes(report, names)]
    axis = drawing.rating_axis
    if quantity == "win_rate":
        highs = [
            row[quantity][group]["high"]
            for distribution, group in where
            for row in results[distribution].values()
            if group in row.get(quantity, {})
        ]
        axis = drawing.win_rate_axis(report["models"][report["baseline"]]["label"], max(highs))
    panels = []
    for distribution, group in where:

        def value(name, rows=results[distribution], group=group):
            return rows.get(name, {}).get(quantity, {}).get(group)

        title = f"{words.distribution(distribution)}, {words.group(group)}"
        panels.append(Panel(title, drawing.by_size(lines, sizes, value, axis)))
    return panels


def _rows(report: dict, values: dict[str, dict | float]) -> list[tuple[str, str, dict]]:
    """(label, colour, interval) of each model, in the report's order; a plain number has no width."""
    names, tints, rows = words.model_names(report), words.colors(report), []
    for name in words.ordered(values, report["models"]):
        value = values[name]
        value = value if isinstance(value, dict) else {"mean": value, "low": value, "high": value}
        rows.append((names.get(name, words.STAGES.get(name, words.plain(name))), tints.get(name, "muted"), value))
    return rows


def _size_label(report: dict, size: str) -> str:
    count = max((m.get("parameters", 0) for m in report["models"].values() if m["size"] == size), default=0)
    return f"{size}\n{words.parameters(count)}" if count else size


def _looks(report: dict, stages: list[str]) -> dict[str, Key]:
    """How each stage is drawn: like the model of its name, else like the method that its name says."""
    tints, names = words.colors(report), words.model_names(report)
    found, used, spare = {}, {}, 0
    for stage in stages:
        last = stage.rsplit("/", 1)[-1]
        tint = tints.get(stage) or tints.get(last) or (last if last in words.METHODS else "")
        if not tint:
            tint, spare = f"extra{1 + spare % 3}", spare + 1
        used[tint] = used.get(tint, -1) + 1
        label = names.get(stage) or (words.STAGES | words.METHODS).get(stage, words.plain(stage))
        found[stage] = Key(label, tint, marker(tint), used[tint])
    return found
