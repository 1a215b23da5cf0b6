"""A set of policies compared as in sections 3.6 and 4 of Ouyang et al. 2022, in that order; one report.

The labelers are people (`config.evaluate.rankings` and `ratings`, files of stage `label`) or simulated, or a reward
model stands for them (`preferences`); the paper's public benchmarks are not here.

What is measured, of each policy of `config.evaluate.models`:

  1. The few-shot prefix of a prompted base model: the written candidate whose answers the reward model scores best.
  2. The reward model itself: accuracy by labeler group beside the labelers' own agreement (section 4.1).
  3. Answers to held-out prompts of each distribution: win rate against the baseline, ratings and metadata (figures 1, 3
     and 4), head-to-head tables, score, KL to the reference, overlap with references, slots.
  4. The alignment tax: the loss on pretraining text and closed tasks (section 4.2).
  5. Training curves, and over-optimisation: score, judge and gold score against KL along a run's snapshots.
  6. Sweeps of a setting (appendix E): the numbers of its policies by its values, see evaluation/sweeps.py.

Results lie in `parts/` of the workdir as they come, so that a run that was killed goes on where it was; the report is
made of them in the end, and its existence says that the stage is complete.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import networks, paths, process
from instructgpt_jax import report as reports
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import chats
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.evaluation import inputs, labelers, language, people, rewards, statistics, sweeps, text
from instructgpt_jax.evaluation.answers import Examiner
from instructgpt_jax.evaluation.parts import Parts
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.networks import Network
from instructgpt_jax.pipeline import TOGETHER, read_seconds
from instructgpt_jax.process import run_together
from instructgpt_jax.training import checkpoint, ledger, resume, tracking

FROZEN = {"ref_policy": "lm", "reward": "scalar", "judge": "scalar"}  # entries of config.models that are no policy


def run(config: ConfigDict, mesh: Mesh, workdir: str) -> None:
    """Evaluates `config.evaluate.models` and writes the report.

    Raises:
      ValueError: a model, a source or a workdir that is not what it must be; before anything is computed.
    """
    started, c, workdir = time.perf_counter(), config.evaluate, epath.Path(workdir)
    folder = epath.Path(c.report) if c.report else workdir / "report"
    tokenizer = tokenizers.load(config.data.tokenizer)
    nets = build_networks(config, mesh, tokenizer)
    known = (workdir / "config.json").exists()
    workdirs.claim(workdirs.resolved(config, {name: net.entry for name, net in nets.items()}), workdir)
    if c.report:  # elsewhere than in the workdir
        paths.make_folder("config.evaluate.report", folder)
    if known and (folder / "report.json").exists():
        process.say(f"evaluate: complete in {folder}, nothing to do")
        return
    data = inputs.load(config, tokenizer, nets["reward"].config.max_length)
    parts = Parts(workdir / "parts")
    if len(parts):  # they are answers to these prompts, judged beside these references
        resume.check_data("evaluate", resume.read_data(workdir), data.read, allowed=None)
    resume.tell_data(data.read, workdir)
    frozen = {name: net for name, net in nets.items() if name in FROZEN}
    examiner = Examiner(config, tokenizer, frozen, mesh)

    report = describe(config, nets, data) | data.earlier
    prefix = report["prefix"] = parts.get("prefix", lambda: choose_prefix(config, nets, examiner, data))
    report["reward_model"] = parts.get("reward_model", lambda: examine_reward_model(config, examiner, data))
    answers = answer(config, nets, examiner, data, prefix, mesh, parts)
    report["results"] = {
        distribution: {name: judge(config, data, distribution, name, answers[distribution]) for name in c.order}
        for distribution in data.prompts
    }
    rows, tables = people.judge(config, data.judged, data.prompts, answers)
    paired = c.labelers and not c.sweeps.runs  # of many policies it would be most of the work
    said = labelers.head_to_head(data.prompts, answers, c.order, config.seed) if paired else {}
    report["head_to_head"] = people.merged(tables, said)
    report["results"] = people.merged(report["results"], rows)
    report["people"] = people.about(data.judged, config.seed)
    report["reward_model"] = people.beside(report["reward_model"], report["people"])
    report["language"] = examine_language(config, nets, tokenizer, data, mesh, parts)
    report["chance"] = {task: language.chance(records) for task, records in data.tasks.items()}
    report["curves"] = data.curves
    report["overoptimisation"] = examine_snapshots(config, nets, examiner, data, mesh, parts)
    report["samples"] = side_by_side(config, data, answers)
    report["perf"] = perf(config, time.perf_counter() - started)
    report = sweeps.apart(report, c.sweeps.to_dict()) if c.sweeps.runs else report
    if jax.process_index() == 0:
        reports.write({key: value for key, value in report.items() if value or key == "seed"}, folder)
        with tracking.run(config.log.wandb, workdir, workdirs.as_json(config)) as tracked:
            tracked.figures(folder)
    process.say(f"evaluate: the report is in {folder}")


# What is evaluated ----------------------------------------------------------------------------------------------------


def build_networks(config: ConfigDict, mesh: Mesh, tokenizer: tokenizers.Tokenizer) -> dict[str, Network]:
    """The frozen networks, and under its name in `config.models` each policy; shapes only."""
    c = config.evaluate
    names = [name for name in FROZEN if name in config.models]
    names += [entry.model for entry in c.models.values() if entry.model not in names]
    nets = {}
    for name in dict.fromkeys(names):
        key, entry, head = f"config.models.{name}", config.models[name], FROZEN.get(name, "lm")
        nets[name] = networks.build(key, entry, head, mesh, tokenizer, config.seed)
        if head == "scalar" and nets[name].grown:
            raise ValueError(f"{key} must be a reward model, got a language model from {entry.init_from!r}")
    networks.check_context("config.evaluate.row_length", c.row_length, *(net.config for net in nets.values()))
    prompted = any(entry.prefix for entry in c.models.values())
    longest = c.max_prompt_length + c.response_length + prompted * c.prefix.max_length
    for entry in c.models.values():
        networks.check_context("prefix, prompt and response of config.evaluate", longest, nets[entry.model].config)
    if c.pretraining.num_sequences:
        policies = (nets[entry.model].config for entry in c.models.values())
        networks.check_context("config.evaluate.pretraining.row_length", c.pretraining.row_length, *policies)
    for run, workdir in c.overoptimisation.runs.items():
        try:
            next(itertools.islice(snapshots(config, nets, workdir, tokenizer, mesh), 1, None), None)  # one for all
        except ValueError as error:
            raise ValueError(f"config.evaluate.overoptimisation.runs.{run}: {error}") from None
    return nets


def weights(network: Network) -> Callable[[], dict]:
    """Loads a network's parameters when first asked; they go when the returned function does."""
    return functools.cache(lambda: networks.freeze(network))


def together(config: ConfigDict, mesh: Mesh, names: Iterable[str], one: Callable[[str], None]) -> None:
    """Runs `one` for each name, `config.evaluate.parallel` of them at once on a CPU, see process.run_together."""

    def run_one(name: str) -> None:
        with jax.set_mesh(mesh):  # a thread has its own
            one(name)

    run_together({name: set() for name in names}, run_one, config.evaluate.parallel)


def describe(config: ConfigDict, nets: dict[str, Network], data: inputs.Data) -> dict:
    """The head of the report: who is compared with whom, on what."""
    c, models = config.evaluate, {}
    for name in c.order:
        entry = c.models[name]
        parameters = sum(x.size for x in jax.tree.leaves(nets[entry.model].abstract))
        about = {"label": entry.label, "method": entry.method, "size": entry.size, "parameters": parameters}
        models[name] = about
    distributions = {name: {"n": len(set(prompts))} for name, prompts in data.prompts.items()}
    head = {"title": c.title, "seed": config.seed, "models": models, "baseline": c.baseline}
    return head | {"distributions": distributions}


# What is measured -----------------------------------------------------------------------------------------------------


def choose_prefix(config: ConfigDict, nets: dict[str, Network], examiner: Examiner, data: inputs.Data) -> dict:
    """Scores the answers of the first prompted policy under each candidate; {} where no policy has a prefix."""
    c = config.evaluate
    prompted = [c.models[name] for name in c.order if c.models[name].prefix]
    if not prompted:
        return {}
    network, candidates = nets[prompted[0].model], []
    params = networks.freeze(network)
    for prefix in c.prefix.candidates:
        found = examiner.answer(network.config, params, "prefix", data.prefix_prompts, prefix)
        candidates.append({"text": prefix, "score": float(np.mean([one["score"] for one in found]))})
        process.say(f"evaluate: prefix {len(candidates)} of {len(c.prefix.candidates)}: {candidates[-1]['score']:.3f}")
    chosen = int(np.argmax([candidate["score"] for candidate in candidates]))
    return {"candidates": candidates, "chosen": chosen}


def examine_reward_model(config: ConfigDict, examiner: Examiner, data: inputs.Data) -> dict:
    """Accuracy and calibration on comparisons; agreement where the labelers are simulated."""
    records = data.comparisons
    if not records:
        return {}
    found = rewards.accuracy(records, examiner.score("reward", records))
    if config.evaluate.labelers:
        found["agreement"] = labelers.agreement(records, config.seed)
    shown = ", ".join(f"{group} {share['mean']:.3f}" for group, share in found["accuracy"].items())
    process.say(f"evaluate: reward model, pair accuracy: {shown}")
    return found


def answer(
    config: ConfigDict,
    nets: dict[str, Network],
    examiner: Examiner,
    data: inputs.Data,
    prefix: dict,
    mesh: Mesh,
    parts: Parts,
) -> dict[str, dict[str, list[dict]]]:
    """distribution -> policy -> its answers, see Examiner.answer."""
    c, found = config.evaluate, {distribution: {} for distribution in data.prompts}

    def ask(name: str) -> None:
        entry = c.models[name]
        network, before = nets[entry.model], prefix["candidates"][prefix["chosen"]]["text"] if entry.prefix else ""
        params = weights(network)
        for distribution, prompts in data.prompts.items():

            def make(prompts=prompts):
                return examiner.answer(network.config, params(), name, prompts, before)

            answers = found[distribution][name] = parts.get(f"answers.{distribution}.{name}", make)
            means = {key: np.mean([one[key] for one in answers]) for key in ("score", "kl", "length", "ended")}
            shown = ", ".join(f"{key} {mean:.3g}" for key, mean in means.items())
            process.say(f"evaluate: {name}, {len(answers)} answers to {distribution} prompts: {shown}")

    together(config, mesh, c.order, ask)
    return found


def judge(config: ConfigDict, data: inputs.Data, distribution: str, name: str, answers: dict[str, list[dict]]) -> dict:
    """All that the report says of one policy's answers to the prompts of one distribution."""
    c, prompts = config.evaluate, data.prompts[distribution]
    texts = [one["text"] for one in answers[name]]
    found = {}
    if c.labelers:
        baseline = [one["text"] for one in answers[c.baseline]]
        found |= labelers.judge(prompts, texts, baseline, config.seed)
    for key in ("score", "judge", "kl", "length", "ended"):
        if key in answers[name][0]:
            found[key] = statistics.interval([float(one[key]) for one in answers[name]], prompts)
    answered = [(given, prompt) for given, prompt in zip(texts, prompts, strict=True) if prompt in data.references]
    if answered:
        written, about = zip(*answered, strict=True)
        references = [data.references[prompt] for prompt in about]
        found["bleu"] = text.bleu(written, references)
        found["rouge_l"] = statistics.interval(list(map(text.rouge_l, written, references)), about)
    if c.slots:
        covered = [text.slot_coverage(prompt, given) for prompt, given in zip(prompts, texts, strict=True)]
        found["slot_coverage"] = statistics.interval(covered, prompts)
    return found


def examine_language(
    config: ConfigDict,
    nets: dict[str, Network],
    tokenizer: tokenizers.Tokenizer,
    data: inputs.Data,
    mesh: Mesh,
    parts: Parts,
) -> dict:
    """The alignment tax of the policy that PPO starts from and of every policy without a prefix: loss, closed tasks."""
    c, found = config.evaluate, {}
    if not data.text and not data.tasks:
        return found

    def make(network: ModelConfig, params: dict) -> dict:
        losses = language.pretraining_losses(network, params, data.text, c.microbatch_rows, mesh) if data.text else []
        answered = {
            task: language.closed_task(network, params, tokenizer, records, c, mesh)
            for task, records in data.tasks.items()
        }
        tasks = {
            key: {task: statistics.interval(rules[rule]) for task, rules in answered.items()}
            for key, rule in (("tasks", "sum"), ("tasks_per_token", "mean"))
        }
        return ({"pretraining_loss": statistics.interval(losses)} if losses else {}) | tasks

    policies = {name: c.models[name].model for name in c.order if not c.models[name].prefix}
    entries = {"ref_policy": "ref_policy"} | policies

    def examine(name: str) -> None:
        network = nets[entries[name]]
        found[name] = parts.get(f"language.{name}", lambda: make(network.config, networks.freeze(network)))
        values = {"loss": found[name].get("pretraining_loss")} | found[name]["tasks"]
        process.say(f"evaluate: {name}: " + ", ".join(f"{key} {x['mean']:.3f}" for key, x in values.items() if x))

    together(config, mesh, entries, examine)
    return {name: found[name] for name in entries}


def examine_snapshots(
    config: ConfigDict, nets: dict[str, Network], examiner: Examiner, data: inputs.Data, mesh: Mesh, parts: Parts
) -> dict[str, list[dict]]:
    """Along each run of `overoptimisation.runs`, from the reference at step 0: mean KL, score, judge and gold score."""
    c, found = config.evaluate, {}

    def make(network: Network) -> dict[str, float]:
        answers = examiner.answer(network.config, networks.freeze(network), "snapshots", data.snapshot_prompts)
        means = {
            key: float(np.mean([one[key] for one in answers])) for key in ("kl", "score", "judge") if key in answers[0]
        }
        if c.labelers:
            means["gold"] = float(np.mean(labelers.gold(data.snapshot_prompts, [one["text"] for one in answers])))
        return means

    for run, workdir in c.overoptimisation.runs.items():
        found[run] = []
        for step, network in snapshots(config, nets, workdir, examiner.tokenizer, mesh):
            means = parts.get(f"snapshots.{run}.{step}" if step else "snapshots", lambda: make(network))  # noqa: B023
            found[run].append({"step": step} | means)
            process.say(f"evaluate: {run} at step {step}: " + ", ".join(f"{k} {v:.3g}" for k, v in means.items()))
    return found


def snapshots(
    config: ConfigDict, nets: dict[str, Network], workdir: str, tokenizer: tokenizers.Tokenizer, mesh: Mesh
) -> Iterator[tuple[int, Network]]:
    """Steps and networks of a PPO run: the reference as step 0, then the snapshots that were kept."""
    yield 0, nets["ref_policy"]
    for step in checkpoint.steps(workdir, checkpoint.SNAPSHOTS):
        entry = {"init_from": f"{workdir}/{checkpoint.SNAPSHOTS}/{step}"}
        yield step, networks.build("config.models.policy", entry, "lm", mesh, tokenizer, config.seed)


def side_by_side(config: ConfigDict, data: inputs.Data, answers: dict[str, dict[str, list[dict]]]) -> list[dict]:
    """The first prompts of each distribution with the answers of all policies side by side."""
    c, found = config.evaluate, []
    for distribution, prompts in data.prompts.items():
        for number, prompt in enumerate(list(dict.fromkeys(prompts))[: c.num_samples]):
            one = {"prompt": prompt, "distribution": distribution}
            if isinstance(prompt, chats.Dialogue):
                one["messages"] = prompt.messages
            if prompt in data.references:
                one["reference"] = data.references[prompt][0]
            responses = {}
            for name in c.order:
                given = answers[distribution][name][number]
                responses[name] = {"text": given["text"], "score": given["score"]}
                if c.labelers:
                    responses[name]["gold"] = labelers.gold([prompt], [given["text"]])[0]
            found.append(one | {"responses": responses})
    return found


# The report -----------------------------------------------------------------------------------------------------------


def perf(config: ConfigDict, seconds: float) -> dict:
    """What may differ between two equal runs: times, versions, device."""
    spent = read_seconds(epath.Path(config.evaluate.seconds)) if config.evaluate.seconds else {}
    spent["evaluate"] = round(spent.get("evaluate", 0.0) + seconds, 1)
    if TOGETHER in spent:  # up to the end of the stage before
        spent[TOGETHER] = round(spent.pop(TOGETHER) + seconds, 1)
    return {"seconds": spent} | ledger.machine()
