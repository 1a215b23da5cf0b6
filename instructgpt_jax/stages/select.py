"""Which epoch of supervised fine-tuning to keep (Ouyang et al. 2022, appendix C.1).

Validation loss overfits after one epoch, yet more epochs make better answers: the paper kept the snapshot whose answers
to validation prompts the reward model scored best. The chosen parameters become the checkpoint of this stage's workdir,
so that `init_from=<workdir>` loads them; `selection.json` has the whole table.
"""

import contextlib
import itertools
import json

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import networks, process, responses
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import datasets
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.training import checkpoint, metrics, resume


def run(config: ConfigDict, mesh: Mesh, workdir: str) -> None:
    """Chooses among the snapshots of the workdir that `config.models.model.init_from` names.

    Raises:
      ValueError: no snapshots there, or with `by='loss'` no validation loss beside one of them.
    """
    source, by, workdir = config.models.model.init_from, config.select.by, epath.Path(workdir)
    steps = checkpoint.steps(source, checkpoint.SNAPSHOTS)
    if not steps:
        raise ValueError(
            f"config.models.model.init_from must be a workdir with snapshots (config.snapshot_every=-1), got {source!r}"
        )
    tokenizer = tokenizers.load(config.data.tokenizer)
    network = networks.build("config.models.model", config.models.model, "lm", mesh, tokenizer, config.seed)
    scorer = Scorer(config, network.config, mesh) if by == "score" else None
    entries = {"model": network.entry} | ({"reward": scorer.reward.entry} if scorer else {})
    resolved = workdirs.claim(workdirs.resolved(config, entries), workdir)
    chosen, damaged = checkpoint.newest(workdir)
    if chosen is not None:
        process.say(f"select: complete in {workdir}, nothing to do")
        return
    if scorer is not None:
        resume.tell_data(scorer.read, workdir)

    def load(step: int) -> dict:
        place = str(epath.Path(source) / checkpoint.SNAPSHOTS / str(step))
        if not networks.trained_adapter(place):
            return checkpoint.load_params(place, network.abstract)
        entry = {**config.models.model, "init_from": place}
        return networks.build("config.models.model", entry, "lm", mesh, tokenizer, config.seed).load()

    table, samples = [], []
    losses = _losses(source, steps) if by == "loss" else {}
    for step in steps:
        process.end_if_stopped()
        if scorer is None:
            table.append({"step": step, "loss": losses[step]})
        else:
            row, answers = scorer.score(load(step))
            table.append({"step": step, **row})
            samples += [{"step": step, **answer} for answer in answers]
        process.say(f"select: {table[-1]}")
    best = min(table, key=lambda row: row["loss"]) if by == "loss" else max(table, key=lambda row: row["score"])

    if jax.process_index() == 0:
        selection = {"init_from": source, "by": by, "step": best["step"], "snapshots": table}
        workdirs.write_atomically(workdir / "selection.json", json.dumps(selection, indent=2) + "\n")
        lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        workdirs.write_atomically(workdir / "samples.jsonl", "".join(lines))
    metadata = {"step": best["step"], "data_index": 0, "config": resolved}
    with checkpoint.Checkpoints(workdir, 1, "", "min") as checkpoints:  # last: it says that the stage is complete
        for step, why in damaged.items():
            process.say(f"select: checkpoint {step} in {workdir} is damaged ({why}), it is made again")
        checkpoints.set_aside(damaged)
        checkpoints.save(best["step"], {"params": load(best["step"])}, metadata, {})
    process.say(f"select: snapshot {best['step']} of {source} is now in {workdir}")


class Scorer:
    """Answers validation prompts, with the same randomness each time, and scores the answers."""

    def __init__(self, config: ConfigDict, policy: ModelConfig, mesh: Mesh):
        c = config.select
        self._options = c
        tokenizer = tokenizers.load(config.data.tokenizer)
        reward = networks.build("config.models.reward", config.models.reward, "scalar", mesh, tokenizer, config.seed)
        networks.check_context("config.select.row_length", c.row_length, policy, reward.config)
        # Validation prompts come once and in order; the rest of them is not read here.
        self._data = datasets.load(config, ConfigDict({**c, "num_epochs": 1}), "prompts", mesh)
        if not self._data.valid:
            share = config.data.valid_fraction
            raise ValueError(f"config.data.prompts must have validation prompts (config.data.valid_fraction={share})")
        self.reward, self.read = reward, self._data.read
        networks.tell_trained_on("select", config.models.model.init_from, self._data.valid_records)
        sampling = config.rollout.wave, config.rollout.cache
        self._sampler = responses.sampler_of(policy, self._data.tokenizer, c, config.seed, *sampling)
        self._reward, self._reward_params = reward.config, networks.freeze(reward)

    def score(self, params: dict) -> tuple[dict, list[dict]]:
        """Mean score, its standard error, mean length and number of answers; and the first few of them."""
        c = self._options
        with contextlib.closing(self._data.valid["valid"]()) as batches:
            prompts = itertools.islice(batches, c.num_batches)
            found, samples = responses.answer_and_measure(self._sampler, params, prompts, self._measure, c.num_samples)
        scores, n = found["score"], len(found["score"])
        row = {"score": scores.mean(), "standard_error": scores.std() / np.sqrt(n), "length": found["length"].mean()}
        return {key: float(value) for key, value in (row | {"n": n}).items()}, samples

    def _measure(self, answers: responses.Answers) -> dict[str, jax.Array]:
        rows = self._options.row_length, self._options.microbatch_rows
        return {"score": responses.score_batch(self._reward, self._reward_params, answers.episodes, *rows)}


def _losses(source: str, steps: list[int]) -> dict[int, float]:
    """The validation loss at each snapshot, as the run that made them measured it."""
    key = f"{checkpoint.read_metadata(source)['config']['stage']}/valid_loss"
    path = epath.Path(source) / "metrics.jsonl"
    found = {line["step"]: line[key] for line in metrics.read_lines(path) if key in line}
    missing = [step for step in steps if step not in found]
    if missing:
        raise ValueError(f"{path} must have {key} at each snapshot (config.eval_every=-1), got none at steps {missing}")
    return found
