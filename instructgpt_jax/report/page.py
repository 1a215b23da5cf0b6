"""The report as one page of HTML: each section is a function from the report to HTML, '' where it has no numbers."""

import html
from collections.abc import Sequence

from instructgpt_jax.report import figures as figure_names
from instructgpt_jax.report import findings, template, words
from instructgpt_jax.report.style import LINES, SIGNS, Figure, Key, svg

PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
SHOWN = 4  # samples before the rest is folded away


def render(report: dict, figures: Sequence[Figure]) -> str:
    """The page, with every figure as inline SVG."""
    drawn = {figure.name: figure for figure in figures}
    sections = (
        ("paper", "The paper and this run", _findings(report)),
        ("preferences", "Which model labelers prefer", _figures(drawn, *figure_names.NAMES[:3])),
        ("metadata", "Following instructions, and the truth", _figures(drawn, "figure4_metadata")),
        ("samples", "Samples side by side", _samples(report)),
        ("scores", "Scores of the responses", _figures(drawn, "scores")),
        ("tax", "The alignment tax", _figures(drawn, "alignment_tax") + _language(report)),
        ("reward", "The reward model", _figures(drawn, "reward_model") + _agreement(report)),
        ("overoptimisation", "Over-optimisation", _figures(drawn, "overoptimisation")),
        ("training", "Training", _figures(drawn, "curves")),
        ("prefix", "The few-shot prefix", _prefix(report)),
        ("numbers", "All numbers", _numbers(report)),
        ("run", "Models, time and versions", _run(report)),
    )
    sections = [section for section in sections if section[2]]
    return template.page(
        title=_text(report["title"]),
        headline=_lines(findings.headline(report) or report["title"]),
        facts=_facts(report),
        contents=" ".join(f'<a href="#{key}">{_text(title)}</a>' for key, title, _ in sections),
        sections="\n".join(
            f'<section id="{key}">\n<h2>{_text(title)}</h2>\n{body}\n</section>' for key, title, body in sections
        ),
        footer='All numbers are in <a href="report.json">report.json</a>; the figures lie beside it as PNG.',
    )


def _text(value) -> str:
    """Escaped; control characters, which HTML has no place for, as their pictures."""
    text = str(value).encode("utf-8", "replace").decode()
    return html.escape(text.translate(PICTURES), quote=True)


def _facts(report: dict) -> str:
    found = []
    for name in words.distributions(report):
        n = report.get("distributions", {}).get(name, {}).get("n")
        if n:
            what = words.DISTRIBUTIONS.get(name, f"prompts ({words.plain(name)})")
            found.append(f"{n:,} held-out {what}")
    facts = [f"Measured on {' and '.join(found)}." if found else ""]
    if any("win_rate" in row for rows in report.get("results", {}).values() for row in rows.values()):
        facts.append("± is half of a 95 % interval.")
    if "seed" in report:
        facts.append(f"Seed {report['seed']}.")
    return _text(" ".join(filter(None, facts)))


def _findings(report: dict) -> str:
    found = findings.findings(report)
    if not found:
        return ""
    classes = {findings.HOLDS: "holds", findings.FAILS: "fails", findings.UNCLEAR: "unclear"}
    signs = {findings.HOLDS: "✓", findings.FAILS: "✗", findings.UNCLEAR: "~"}
    rows = "".join(
        f"<tr><td>{_text(f.claim)}</td><td>{_lines(f.paper)}</td><td>{_lines(f.here)}</td>"
        f'<td class="{classes[f.verdict]}">{signs[f.verdict]} {_text(f.verdict)}</td></tr>\n'
        for f in found
    )
    holds = sum(f.verdict == findings.HOLDS for f in found)
    return (
        f"<p>{holds} of {len(found)} statements hold in this run. Preferences are win rates against the SFT baseline. "
        "The paper's numbers are of other models, prompts and people: compare directions, not sizes. An ordering holds "
        f"where the 95 % intervals are apart; where they overlap it is {findings.UNCLEAR}.</p>"
        '<div class="scroll"><table class="findings"><thead><tr><th>Finding</th><th>Paper</th><th>This run</th>'
        f"<th>Verdict</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _lines(text: str) -> str:
    """Lines stay lines, and a number stays with its unit."""
    return _text(text).replace("\n", "<br>").replace(" ±", "&nbsp;±").replace("± ", "±&nbsp;").replace(" %", "&nbsp;%")


def _figures(drawn: dict[str, Figure], *names: str) -> str:
    found = [drawn[name] for name in names if name in drawn]
    return "\n".join(_figure(figure, titled=len(names) > 1) for figure in found)


def _figure(figure: Figure, titled: bool) -> str:
    panels = "".join(
        f'<div class="panel"><h4>{_text(panel.title)}</h4>{svg(panel, f"{figure.name}-{n}")}</div>\n'
        for n, panel in enumerate(figure.panels)
    )
    legend = "".join(f"<li>{_sign(key)}{_text(key.label)}</li>" for key in figure.legend)
    few = len(figure.panels) == 2 or figure.columns == 2
    form = " one" if len(figure.panels) == 1 else " two" if few else ""
    title = f"<h3>{_text(figure.title)}</h3>" if titled else ""
    return (
        f'<figure id="figure_{figure.name}">\n{title}<figcaption>{_lines(figure.caption)}</figcaption>\n'
        + (f'<ul class="legend">{legend}</ul>\n' if legend else "")
        + f'<div class="panels{form}">\n{panels}</div>\n'
        + f'<p class="png"><a href="{figure.name}.png">{figure.name}.png</a></p>\n</figure>'
    )


def _sign(key: Key) -> str:
    """The marker of a legend on its line."""
    dashes = "" if key.line == 0 else f' stroke-dasharray="{" ".join(str(2 * x) for x in LINES[key.line % 4][1])}"'
    return (
        f'<svg class="sign" viewBox="0 0 32 14" aria-hidden="true" style="color: {_variable(key.color)}">'
        f'<line x1="0" y1="7" x2="32" y2="7" stroke="currentColor" stroke-width="2"{dashes}/>'
        f'<text x="16" y="12" text-anchor="middle" fill="currentColor">{SIGNS[key.marker]}</text></svg>'
    )


def _variable(color: str) -> str:
    return f"var(--{color.replace('_', '-')})"


def _samples(report: dict) -> str:
    samples = report.get("samples", [])
    if not samples:
        return ""
    names, tints = words.model_names(report), words.colors(report)
    cards = []
    for sample in _in_turn(report, samples):
        responses = [("Human reference", "ink", {"text": sample["reference"]})] if sample.get("reference") else []
        found = sample["responses"]
        responses += [(names[name], tints[name], found[name]) for name in report["models"] if name in found]
        kind = words.distribution(sample["distribution"]) if "distribution" in sample else "Prompt"
        answers = "".join(_response(*response) for response in responses)
        prompt = f'<div class="prompt text">{_text(sample["prompt"].strip())}</div>'
        cards.append(
            f'<div class="sample"><h3>{_text(kind)}</h3>\n{prompt}\n<div class="responses">{answers}</div></div>'
        )
    gold = ", the gold score what the labelers' judgements are made from"
    known = any("gold" in response for sample in samples for response in sample["responses"].values())
    note = f"The same prompts, answered by every model. The score is the reward model's{gold if known else ''}."
    body = f"<p>{note}</p>\n" + "\n".join(cards[:SHOWN])
    if len(cards) > SHOWN:
        rest = "\n".join(cards[SHOWN:])
        body += f"\n<details><summary>{len(cards) - SHOWN} more prompts</summary>\n{rest}\n</details>"
    return body


def _in_turn(report: dict, samples: list[dict]) -> list[dict]:
    """The first sample of each distribution, then the second of each, and so on."""
    order, seen, places = words.distributions(report), {}, []
    for n, sample in enumerate(samples):
        name = sample.get("distribution", "")
        seen[name] = seen.get(name, 0) + 1
        places.append((seen[name], order.index(name) if name in order else len(order), n))
    return [samples[n] for _, _, n in sorted(places)]


def _response(name: str, tint: str, response: dict) -> str:
    known = [key for key in ("score", "gold") if response.get(key) is not None]
    scores = " · ".join(f"{key} {words.number(response[key])}" for key in known)
    text = response["text"].strip()
    body = f'<div class="text">{_text(text)}</div>' if text else '<div class="empty">(empty)</div>'
    heading = f"<h3>{_text(name)}" + (f' <span class="scores">{_text(scores)}</span>' if scores else "") + "</h3>"
    return f'<div class="response" style="--tint: {_variable(tint)}">{heading}{body}</div>'


def _prefix(report: dict) -> str:
    found = report.get("prefix", {})
    candidates = found.get("candidates", [])
    if not candidates:
        return ""
    cards = []
    for n, candidate in enumerate(candidates):
        chosen = n == found.get("chosen")
        cards.append(
            f'<div class="prompt prefix{" chosen" * chosen}"><h3>Candidate {n + 1}{", chosen" * chosen} '
            f'<span class="scores">mean score {words.number(words.mean(candidate["score"]))}</span></h3>'
            f'<div class="text">{_text(candidate["text"].strip())}</div></div>'
        )
    note = (
        "Prompted GPT reads one of these before each prompt: the one whose responses to validation prompts have the "
        "highest mean score."
    )
    return f"<p>{note}</p><details><summary>{len(candidates)} candidates</summary>{''.join(cards)}</details>"


def _numbers(report: dict) -> str:
    tables = "\n".join(_distribution(report, name) for name in words.distributions(report) if report["results"][name])
    if not tables:
        return ""
    present = {key for rows in report["results"].values() for row in rows.values() for key in row}
    notes = [
        f"{name.split(',')[0]}: {note}" for key, (name, _, note) in words.METRICS.items() if note and key in present
    ]
    text = f"Means, and below them their 95 % intervals. {'; '.join(notes)}{'.' if notes else ''}"
    return f"<p>{_lines(text)}</p>\n{tables}"


def _distribution(report: dict, distribution: str) -> str:
    """Rows are quantities, columns are models."""
    names = words.model_names(report)
    found = report["results"][distribution]
    shown = [name for name in report["models"] if name in found]
    rows = []
    for key, title, form in (
        ("win_rate", "Win rate against the baseline, %", "share"),
        ("likert", "Rating, 1 to 7", "number"),
        ("metadata", "Properties, % of responses", "share"),
    ):
        inner = list(dict.fromkeys(name for model in shown for name in found[model].get(key, {})))
        if inner:
            rows.append(f'<tr class="head"><th colspan="{len(shown) + 1}">{_text(title)}</th></tr>')
        for name in inner:
            label = words.METADATA.get(name, words.plain(name)) if key == "metadata" else words.group(name)
            rows.append(_numbers_row(label, [found[model].get(key, {}).get(name) for model in shown], form))
    grouped = ("win_rate", "likert", "metadata")
    keys = dict.fromkeys(key for model in shown for key in found[model] if key not in grouped)
    others = words.ordered(keys, words.METRICS)
    if others and rows:
        rows.append(f'<tr class="head"><th colspan="{len(shown) + 1}">Scores and text</th></tr>')
    for key in others:
        label, form, _ = words.METRICS.get(key, (words.plain(key), "number", ""))
        rows.append(_numbers_row(label, [found[model].get(key) for model in shown], form))
    return f'<h3 class="of">{_text(words.distribution(distribution))}</h3>' + _table(
        [names[name] for name in shown], rows
    )


def _language(report: dict) -> str:
    """The alignment tax in numbers."""
    found = report.get("language", {})
    shown = words.language_order(report)
    if not shown:
        return ""
    rows = []
    if any("pretraining_loss" in row for row in found.values()):
        losses = [found[name].get("pretraining_loss") for name in shown]
        rows.append(_numbers_row("Pretraining loss, nats a token", losses, "fine"))
    for task in dict.fromkeys(task for row in found.values() for task in row.get("tasks", {})):
        chance = report.get("chance", {}).get(task)
        note = "" if chance is None else f"chance {100 * chance:.1f} %"
        values = [found[name].get("tasks", {}).get(task) for name in shown]
        rows.append(_numbers_row(f"{words.plain(task)}, % right", values, "share", note))
    names = words.STAGES | words.model_names(report)
    return _table([names.get(name, words.plain(name)) for name in shown], rows)


def _agreement(report: dict) -> str:
    """The reward model's accuracy in numbers."""
    found = report.get("reward_model", {})
    accuracy, agreement = found.get("accuracy", {}), found.get("agreement", {})
    groups = words.ordered(accuracy | agreement, words.GROUPS)
    if not groups:
        return ""
    rows = [_numbers_row("Accuracy, % of pairs", [accuracy.get(group) for group in groups], "share")]
    if agreement:
        rows.append(_numbers_row("Agreement of labelers, %", [agreement.get(group) for group in groups], "share"))
    return _table([words.group(group) for group in groups], rows)


def _table(columns: list[str], rows: list[str]) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    return (
        f'<div class="scroll{" small" * (len(columns) < 3)}"><table class="numbers"><thead><tr><th></th>'
        f"{head}</tr></thead><tbody>\n{chr(10).join(rows)}\n</tbody></table></div>"
    )


def _numbers_row(label: str, values: list, form: str, note: str = "") -> str:
    cells = []
    for value in values:
        text, interval = words.cell(value, form)
        cells.append(f"<td>{_text(text)}" + (f"<small>{_text(interval)}</small>" if interval else "") + "</td>")
    small = f"<small>{_text(note)}</small>" if note else ""
    return f"<tr><th>{_text(label)}{small}</th>{''.join(cells)}</tr>"


def _run(report: dict) -> str:
    perf, tables = report.get("perf", {}), []
    names, models = words.model_names(report), []
    for name, model in report["models"].items():
        count = f"{words.parameters(model['parameters'])} parameters" if model.get("parameters") else model["size"]
        models.append((names[name], count))
    tables.append(_pairs("Models", models))
    if perf.get("seconds"):
        times = [(words.plain(stage), words.seconds(value)) for stage, value in perf["seconds"].items()]
        tables.append(_pairs("Time", times))
    about = [("device", perf["device"])] if perf.get("device") else []
    about += list(perf.get("versions", {}).items())
    if about:
        tables.append(_pairs("Versions", about))
    return f'<div class="columns">{"".join(tables)}</div>'


def _pairs(title: str, pairs: list[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><td>{_text(key)}</td><td>{_text(value)}</td></tr>" for key, value in pairs)
    head = f'<thead><tr><th colspan="2">{_text(title)}</th></tr></thead>'
    return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'
