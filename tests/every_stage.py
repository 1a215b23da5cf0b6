"""Every stage once, as a pipeline of runs of a few updates on the simulated world; for any mesh of up to eight devices.

--config=tests/every_stage.py                     all but `benchmark`
--config=tests/every_stage.py:all,FOLDER          also that, on the records that `write_benchmark` has put into FOLDER
--config=tests/every_stage.py:pretrain            that stage alone, longer
--config=tests/every_stage.py:short               pretraining, SFT and a longer PPO-ptx alone, with a fresh reward model
--config=tests/every_stage.py:adapters            pretraining, and SFT, reward model and PPO-ptx on adapters
--config=tests/every_stage.py:measured[,FOLDER]   pretraining, and what measures its model with a fresh reward model

A network is wide enough for a tensor axis of four; every batch is a multiple of eight.
"""

import json
import pathlib
import sys

from ml_collections import config_dict

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs import common, measured
from instructgpt_jax import simulated

ANSWERS = {"max_prompt_length": 96, "response_length": 8, "batch_size": 16}
ROWS = {"row_length": 128, "microbatch_rows": 8}
TINY = {"num_layers": 1, "width": 32, "num_heads": 4, "mlp_width": 64, "max_length": 256, "positions": "rotary"}
TASK = "sst2"


def write_benchmark(folder: pathlib.Path) -> None:
    """Sentences that are good or bad, as evaluation/benchmarks/local.py reads them."""
    rows = [{"sentence": f"the film is number {n} ", "label": n % 2} for n in range(8)]
    (folder / f"{TASK}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def trained(stage, init_from="", **changes):
    """A stage of training: a few updates, saved after every second one."""
    config = common.ppo(policy_lr=1e-3, value_lr=1e-3, ptx_coef=1.0) if stage == "ppo" else common.config(stage)
    config.log_every = 1
    config.eval_every = config.checkpoint.every = 2
    config.data.skip_bad = 40  # what is too long for a row
    config.data.max_prompt_tokens = 96
    if stage != "ppo":
        config.models.model = common.network(init_from="{workdir}/" + init_from) if init_from else common.network()
    for kind, size in {"demonstrations": 60, "comparisons": 40, "prompts": 60, "pretraining": 200}.items():
        config.data[kind] = (f"simulated:{kind}:train:{size}",)
    config.update_from_flattened_dict(changes)
    return config


def get_config(argument=""):
    part, _, folder = argument.partition(",")
    steps = {"batch_size": 8, "num_epochs": 2, "num_steps": 4} | ROWS
    adam = common.optimizer(1e-3, "constant", eps=1e-3)  # else Adam makes steps of rounding errors
    stages = {"pretrain": trained("pretrain")}
    stages["pretrain"].data.tokenizer = "train:400"
    stages["pretrain"].models.model = common.network("tiny", **TINY)
    stages["pretrain"].pretrain = common.pretraining(1e-3, 8, 4, 128)
    stages["sft"] = trained("sft", "pretrain", snapshot_every=2)
    stages["sft"].sft = common.fine_tuning(1e-3, 8, 2, 0.1)
    stages["sft"].sft.update(steps)
    stages["collect"] = common.collection()
    stages["collect"].models.sft = common.network(init_from="{workdir}/sft")
    stages["collect"].data.prompts = ("simulated:prompts:train:60",)
    stages["collect"].data.max_prompt_tokens = 96
    stages["collect"].collect.update(ANSWERS | {"num_prompts": 16, "labelers": ("training", "heldout")})
    stages["reward"] = trained("reward", "sft")
    stages["reward"].data.comparisons = ("jsonl:{workdir}/collect/comparisons.jsonl", "simulated:comparisons:train:40")
    stages["folds"] = trained("reward", "sft", eval_every=0)
    stages["folds"].data.comparisons = ("jsonl:{workdir}/collect/comparisons.jsonl",)
    for name in ("reward", "folds"):
        stages[name].reward = common.rankings(1e-3, 8)
        stages[name].reward.update(steps | {"row_length": 256, "microbatch_rows": 32})  # 8 rows a process, or more
    stages["folds"].reward.update({"folds": 2, "num_steps": 2})
    stages["folds"].data.valid_fraction = 0.2
    stages["select"] = common.selection()
    stages["select"].models.model = common.network(init_from="{workdir}/sft")
    stages["select"].models.reward = common.network(init_from="{workdir}/reward")
    stages["select"].data.update(prompts=("simulated:prompts:train:120",), max_prompt_tokens=96, valid_fraction=0.2)
    stages["select"].select.update(ANSWERS | ROWS | {"num_batches": 1})
    stages["select"].rollout.wave = 16
    stages["ppo"] = trained("ppo", eval_every=0)
    stages["ppo"].models.policy = common.network(init_from="{workdir}/select")
    stages["ppo"].models.reward = common.network(init_from="{workdir}/reward")
    stages["ppo"].rollout.wave = 0
    ptx = {"ptx_ratio": 1, "ptx_row_length": 128, "ptx_microbatch_rows": 8, "num_samples": 2}
    stages["ppo"].ppo.update(ANSWERS | ROWS | ptx | {"iterations": 4, "num_minibatches": 2})
    for optimizer in (
        stages["pretrain"].pretrain.optimizer, stages["sft"].sft.optimizer, stages["reward"].reward.optimizer,
        stages["folds"].reward.optimizer, stages["ppo"].ppo.policy_optimizer, stages["ppo"].ppo.value_optimizer,
    ):  # fmt: skip
        optimizer.update(adam)
    stages["evaluate"] = evaluation()
    stages["rewards"] = measured.reward_evaluation()
    stages["rewards"].models.reward = common.network(init_from="{workdir}/reward")
    about = {"comparisons": ("simulated:comparisons:test:16",), "batch_size": 16, "row_length": 256}
    stages["rewards"].evaluate_reward.update(about | {"microbatch_rows": 8})
    stages["sample"] = common.config("sample")
    stages["sample"].models.model = common.network(init_from="{workdir}/ppo")
    stages["sample"].sample = common.sampling(8) | {"prompts": ("the cat", "a dog"), "file": "", "batch_size": 8}
    stages["export"] = common.config("export")
    stages["export"].models.model = common.network(init_from="{workdir}/ppo")
    stages["export"].export = common.export() | {"dtype": "float32"}
    if part == "short":
        stages = {name: stages[name] for name in ("pretrain", "sft", "ppo")}
        stages["ppo"].models.policy = common.network(init_from="{workdir}/sft")
        stages["ppo"].models.reward = common.network("tiny", **TINY)
        stages["ppo"].ppo.iterations = 8
    if part == "adapters":
        stages = {name: stages[name] for name in ("pretrain", "sft", "reward", "ppo")}
        stages["reward"].data.comparisons = ("simulated:comparisons:train:40",)
        stages["ppo"].models.policy = common.network(init_from="{workdir}/sft")
        for stage, name in (("sft", "model"), ("reward", "model"), ("ppo", "policy"), ("ppo", "value")):
            stages[stage].models[name].adapter.update(common.adapter(rank=4, alpha=8.0, targets=("all",)))
    if folder:
        asked = [
            measured.Policy("select", "sft", "SFT", "sft", "tiny"),
            measured.Policy("ppo", "ppo", "PPO", "ppo", "tiny"),
        ]
        stages["benchmark"] = measured.benchmark("test", asked)
        stages["benchmark"].benchmark.update({"tasks": (TASK,), "data_dir": folder, "limit": 8})
    if part == "measured":
        stages = {name: stages[name] for name in ("pretrain", "collect", "evaluate", "benchmark") if name in stages}
        for stage in stages.values():
            for name, entry in stage.models.items():
                if name == "reward":
                    stage.models.reward = common.network("tiny", **TINY)
                elif entry.init_from:
                    entry.init_from = "{workdir}/pretrain"
        stages["evaluate"].evaluate.curves = {"pretrain": "{workdir}/pretrain"}
        stages["evaluate"].data.tokenizer = "{workdir}/pretrain/tokenizer"
    if part == "pretrain":
        stages = {part: stages[part]}
        stages[part].pretrain.num_steps, stages[part].eval_every = 40, 0
    config = common.pipeline(stages)
    config.tensor = config_dict.FieldReference(1)  # the mesh of all of them
    for stage in stages.values():
        stage.mesh.tensor = config.get_ref("tensor")
    return config


def evaluation():
    policies = [
        measured.Policy("pretrain", "prefix", "GPT (prompted)", "prefix", "tiny"),
        measured.Policy("select", "sft", "SFT", "sft", "tiny"),
        measured.Policy("ppo", "ppo", "PPO", "ppo", "tiny"),
    ]
    config = measured.evaluation("every stage", {"reward": "reward", "ref_policy": "select"}, policies)
    config.data.pretraining = ("simulated:pretraining:test:40",)
    config.data.max_prompt_tokens = 96
    config.evaluate.update(ANSWERS | ROWS | {
        "distributions": {"instruct": ("simulated:prompts:test:30",)}, "num_prompts": 16, "labelers": True,
        "tasks": {"cloze": ("simulated:cloze:test:16",)}, "accuracy": ("simulated:comparisons:test:16",),
        "pretraining": {"num_sequences": 16, "row_length": 64}, "row_length": 256, "num_samples": 2,
        "prefix": {"candidates": simulated.prefixes()[:2], "prompts": ("simulated:prompts:valid:8",), "max_length": 64},
        "curves": {"sft": "{workdir}/sft"}, "report": "",  # in the stage's own workdir
    })  # fmt: skip
    return config
