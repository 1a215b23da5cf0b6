"""Whether what a configuration names is there: records, networks, tokenizers; before the first record is read.

`validate` judges the configuration alone; here the disk is asked too, but nothing larger than a config.json is read.
"""

import importlib.util
from collections.abc import Callable

from etils import epath
from ml_collections import ConfigDict

from instructgpt_jax import networks, paths, run_tokenizer
from instructgpt_jax.data import chats, jsonl, sources, tables, templates
from instructgpt_jax.labeling import server
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.training import checkpoint
from instructgpt_jax.validate import TRAINED, WITHOUT_TOKENIZER, kinds_read, networks_used
from instructgpt_jax.validate.evaluation import PERSPECTIVE


def check(config: ConfigDict, workdir: str, later: str = "") -> None:
    """Refuses files of records, networks and a tokenizer that are not there, and rows that a network does not hold.

    Args:
      config: of one stage, valid.
      workdir: of the stage; what it keeps of an earlier run, its state and its tokenizer, is not asked for again.
      later: a folder, '' = none, in which other stages will still write: what lies there is not looked for.
    """

    if config.get("log", {}).get("wandb", "") and importlib.util.find_spec("wandb") is None:
        project = config.log.wandb
        raise ValueError(f"config.log.wandb must be '' without the package wandb (pip install wandb), got {project!r}")

    def expected(place: str) -> bool:
        """Whether it must be there now."""
        return not (later and f"{place}/".startswith(f"{later.rstrip('/')}/"))

    kept = (epath.Path(workdir) / "tokenizer" / "tokenizer.json").exists()
    if config.stage != "export":
        read = {f"config.data.{kind}": config.data[kind] for kind in kinds_read(config, with_tokenizer=not kept)}
        if config.stage in ("evaluate", "evaluate_reward", "prompts"):
            found = paths.find(config[config.stage], paths.SOURCES, f"{config.stage}.")
            read |= {f"config.{name}": section[key] for name, section, key in found}
        if config.stage == "label" and config.label.step in ("make", "simulate"):
            read["config.label.source"] = config.label.source
        for name, given in read.items():
            for form, place, *_ in map(sources.parse, given):
                if form in ("jsonl", "parquet", "hf") and expected(place):
                    try:
                        tables.check_hf(place) if form == "hf" else jsonl.match(place, form)
                    except ValueError as error:
                        raise ValueError(f"{name}: {error}") from None
        wanted = "" if kept or config.data.tokenizer.startswith("train:") else config.data.tokenizer
        if wanted and expected(wanted):
            _check_tokenizer(wanted)
        if config.data.template not in chats.NAMES and not kept:
            templates.source(config.data.template, None, wanted)  # is it there
    if config.stage == "label":
        _check_files_of_labeling(config.label, expected)
    if config.stage == "benchmark":
        _check_benchmark(config.benchmark, expected)
    if config.stage in TRAINED and checkpoint.steps(workdir):
        return
    shapes, empty = {}, networks.stand_ins(config)
    for name in networks_used(config):
        entry = config.models[name]
        if name not in empty and expected(entry.get("init_from", "")):
            shapes[name] = networks.shape(f"config.models.{name}", entry)
    _check_rows(config, shapes)
    if config.stage not in WITHOUT_TOKENIZER and not kept:
        run_tokenizer.name_for(config)


def _check_files_of_labeling(c: ConfigDict, expected: Callable[[str], bool]) -> None:
    """Refuses files that a step of labelling reads and that are not there, and a server that cannot be spoken to."""
    named = {"labelers": (c.labelers,) if c.step != "simulate" else ()}
    named |= {"instructions": (c.instructions,) if c.instructions else ()}
    named |= {"export": c.export} if c.step == "read" else {}
    for key, files in named.items():
        for file in files:
            try:
                found = not expected(file) or jsonl.match(file, "json")
            except ValueError:
                found = False
            if not found:
                raise ValueError(f"config.label.{key} must name a file that exists, got {file!r}")
    if c.step in ("push", "pull"):
        server.check()


def _check_benchmark(c: ConfigDict, expected: Callable[[str], bool]) -> None:
    """Refuses benchmarks without the harness, a folder of data and graders that are not there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("benchmarks need the extra 'eval' (pip install 'instructgpt-jax[eval]')")
    if c.data_dir and not epath.Path(c.data_dir).is_dir():
        raise ValueError(f"config.benchmark.data_dir must be a folder that exists, got {c.data_dir!r}")
    for what, source in c.graders.items():
        known = source in ("", PERSPECTIVE) or networks.is_hub_id(source) or epath.Path(source).exists()
        if not known and expected(source):
            raise ValueError(f"config.benchmark.graders.{what} must be a model that exists, got {source!r}")


def _check_tokenizer(name: str) -> None:
    """Refuses what is no directory and cannot be a Hub id, `model` or `owner/model`."""
    if "/" in name and not networks.is_hub_id(name) and not epath.Path(name).is_dir():
        raise ValueError(f"config.data.tokenizer must be a directory that exists, a Hub id or train:SIZE, got {name!r}")


def _check_rows(config: ConfigDict, shapes: dict[str, ModelConfig]) -> None:
    stage = config.stage
    if "row_length" in config.get(stage, {}) and stage != "benchmark":  # whose rows hold several texts, cut to fit
        networks.check_context(f"config.{stage}.row_length", config[stage].row_length, *shapes.values())
    if stage == "ppo" and config.ppo.ptx_coef and "policy" in shapes:
        networks.check_context("config.ppo.ptx_row_length", config.ppo.ptx_row_length, shapes["policy"])
