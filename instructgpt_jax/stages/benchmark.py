"""The paper's public benchmarks (section 4.2, appendices D and E), policies side by side; one report.

Tasks are those of lm-evaluation-harness (extra `eval`) and ours with the paper's prompts
(`evaluation/benchmarks/catalog.py`), by their names or by the preset `paper`. Each policy of `config.benchmark.models`
answers each task; results lie in `parts/` of the workdir as they come, so that a run that was killed goes on where it
was. Beside the report are `samples/TASK.csv`, in the layout of the paper's released samples. The report's existence
says that the stage is complete.

Graders read the answers afterwards (`config.benchmark.graders`); a number whose grader is not there is absent.
Policies may have tokenizers of their own.
"""

import functools
import time
from collections.abc import Callable, Sequence

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import networks, process, run_tokenizer
from instructgpt_jax import report as reports
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.cluster import agreeing
from instructgpt_jax.data import chats
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.evaluation.benchmarks import catalog, graders, perspective, samples
from instructgpt_jax.evaluation.parts import Parts
from instructgpt_jax.networks import Network
from instructgpt_jax.training import ledger, tracking
from instructgpt_jax.validate.evaluation import PERSPECTIVE

PAPER = "paper"  # among the tasks: all of catalog.PAPER


def run(config: ConfigDict, mesh: Mesh, workdir: str) -> None:
    """Has every policy answer every task, and writes the report and the samples into the workdir.

    Raises:
      ValueError: no lm-eval, a task without data, a policy without a tokenizer, a grader that cannot judge, or data
        that have changed since a part was made.
    """
    started, c, folder = time.perf_counter(), config.benchmark, epath.Path(workdir)
    nets = {name: build(config, c.models[name].model, mesh) for name in c.order}
    entries = {c.models[name].model: network.entry for name, (network, _) in nets.items()}
    workdirs.claim(workdirs.resolved(config, entries), folder)
    if (folder / "report" / "report.json").exists():
        process.say(f"benchmark: complete in {folder / 'report'}, nothing to do")
        return
    names = dict.fromkeys(name for task in c.tasks for name in (catalog.PAPER if task == PAPER else (task,)))
    tasks = catalog.load(list(names), c.data_dir)
    from instructgpt_jax.evaluation.benchmarks import outcome  # needs lm-eval, which catalog.load has asked for

    parts = Parts(folder / "parts")
    given = {task: outcome.documents(tasks[task], c.limit) for task in tasks}
    agreeing.same("tasks", {task: outcome.fingerprint(documents) for task, documents in given.items()})
    found: dict[str, dict[str, dict]] = {task: {} for task in tasks}
    for name in c.order:
        lm = functools.cache(lambda name=name: model(config, *nets[name], mesh))  # loaded where a part is missing
        for task in tasks:
            one = parts.get(f"{name}.{task}", lambda: ask(config, lm(), tasks[task]))  # noqa: B023
            check(f"{folder / 'parts'}/{name}.{task}.json", task, one["documents"], outcome.fingerprint(given[task]))
            found[task][name] = one
            shown = ", ".join(f"{key} {reports.words.mean(value):.3f}" for key, value in one["numbers"].items())
            process.say(f"benchmark: {name}, {task}, n {one['n']}: {shown}" + f", {one['cut']} cut" * bool(one["cut"]))
    scores = grade(config, mesh, parts, found, given, outcome.wanted)
    for task, models in scores.items():
        for name, judged in models.items():
            found[task][name]["numbers"] |= outcome.graded(judged)
    report = describe(config, nets, found) | {"benchmark_figures": outcome.figures(found)}
    report["toxicity_by_prompt"] = outcome.by_prompt(given, scores)
    report["perf"] = {"seconds": {"benchmark": round(time.perf_counter() - started, 1)}} | ledger.machine()
    if jax.process_index() == 0:
        write_samples(config, folder / "samples", found, given, scores)
        reports.write({key: value for key, value in report.items() if value or key == "seed"}, folder / "report")
        with tracking.run(config.log.wandb, folder, workdirs.as_json(config)) as tracked:
            tracked.figures(folder / "report")
    process.say(f"benchmark: the report is in {folder / 'report'}")


def build(config: ConfigDict, name: str, mesh: Mesh) -> tuple[Network, tokenizers.Tokenizer]:
    """A policy, and the tokenizer that it reads by: `config.data.tokenizer`, or the one that comes with it.

    A chat template is there only where prompts are to be written by it.
    """
    key, entry = f"config.models.{name}", config.models[name]
    wanted = config.data.tokenizer or run_tokenizer.beside(entry.init_from)
    if not wanted:
        raise ValueError(f"config.data.tokenizer must be set, {key}.init_from={entry.init_from!r} has none")
    plain = chats.Chat("", tuple(config.data.end_tokens))
    tokenizer = tokenizers.load(wanted, run_tokenizer.chat_of(config, wanted) if config.benchmark.chat else plain)
    return networks.build(key, entry, "lm", mesh, tokenizer, config.seed), tokenizer


def model(config: ConfigDict, network: Network, tokenizer: tokenizers.Tokenizer, mesh: Mesh):
    """A policy as the harness asks it, with its weights."""
    from instructgpt_jax.evaluation.benchmarks import adapter

    c = config.benchmark
    options = adapter.Options(c.row_length, c.microbatch_rows, c.batch_size)
    return adapter.PolicyLM(network.config, networks.freeze(network), tokenizer, mesh, options, config.seed)


def ask(config: ConfigDict, lm, task) -> dict:
    """One policy's answers to a task, see outcome.answer."""
    from instructgpt_jax.evaluation.benchmarks import outcome

    c = config.benchmark
    return outcome.answer(lm, task, c.limit, c.num_fewshot, c.chat)


def check(path: str, task: str, before: str, now: str) -> None:
    """Refuses a part that was made of other documents than there are now."""
    if before != now:
        raise ValueError(f"the data of {task} must stay the same, {path} has answers to others: take a new --workdir")


def grade(
    config: ConfigDict,
    mesh: Mesh,
    parts: Parts,
    found: dict[str, dict[str, dict]],
    given: dict[str, list[dict]],
    wanted: Callable[[str], Sequence[str]],
) -> dict[str, dict[str, dict[str, list]]]:
    """task -> policy -> true, info or toxicity -> a probability for each answer, by the graders that there are."""
    c = config.benchmark
    scores = {task: {name: {} for name in c.order} for task in found}
    for what, source in c.graders.items():
        tasks = [task for task in found if what in wanted(task)]
        if not source or not tasks:
            continue
        grader = functools.cache(lambda: graders.load(what, source, mesh))  # noqa: B023

        def judge(task: str, name: str) -> list[float | None]:
            answers = found[task][name]["answers"]
            if source == PERSPECTIVE:  # noqa: B023
                options = perspective.Options(**c.perspective)
                return perspective.toxicity(answers, parts.folder.parent / "perspective.jsonl", options)
            questions = [one.get("question", one["query"]) for one in given[task]]
            return graders.probabilities(grader(), questions, answers, c, mesh)  # noqa: B023

        for task in tasks:
            for name in c.order:
                key = f"{name}.{task}.{what}"
                scores[task][name][what] = parts.get(key, lambda: judge(task, name))  # noqa: B023
        process.say(f"benchmark: {what} judged by {source}")
    return scores


def describe(config: ConfigDict, nets: dict, found: dict[str, dict[str, dict]]) -> dict:
    """The report but for its figures: who was asked, and all numbers by task."""
    c, models = config.benchmark, {}
    for name in c.order:
        entry, parameters = c.models[name], sum(x.size for x in jax.tree.leaves(nets[name][0].abstract))
        models[name] = {"label": entry.label, "method": entry.method, "size": entry.size, "parameters": parameters}
    numbers = {task: {name: one["numbers"] for name, one in policies.items()} for task, policies in found.items()}
    about = {}
    for task, policies in found.items():
        cut = {name: one["cut"] for name, one in policies.items()}
        about[task] = {"n": policies[c.order[0]]["n"], "cut": cut}
    head = {"title": c.title, "seed": config.seed, "models": models}
    return head | {"benchmarks": numbers, "benchmark_tasks": about}


def write_samples(config: ConfigDict, folder: epath.Path, found: dict, given: dict, scores: dict) -> None:
    """`TASK.csv` of each task whose kind the paper released samples of."""
    c = config.benchmark
    for task, policies in found.items():
        if samples.released(task):
            folder.mkdir(parents=True, exist_ok=True)
            lines = []
            for name in c.order:
                lines += samples.rows(task, given[task], policies[name]["answers"], scores[task][name], name)
            samples.write(folder / f"{task}.csv", lines)
