"""The three steps of the paper, and their evaluation, on the embedded world: no download, no GPU.

Paper:    figure 2, sections 3.2 and 4: raw prompts made into sets, two sizes of a base model, supervised fine-tuning, a
          reward model on K = 4 to 9 ranked completions of that policy, its accuracy on labelers unseen in training, PPO
          and PPO-ptx, and their evaluation by labelers.
Command:  python -m instructgpt_jax.main --config=configs/quickstart.py
          One stage alone: --config.only=reward. Another seed: --config.seed=1. `:tiny` runs the stages for a few
          updates, without the negative control; `:full` adds the settings of PPO that appendix E of the paper varies
          (ablations.py), a second round of comparisons, and every stage of the larger size, whose base model then has
          as much text for each of its parameters as the small one's; it takes an hour and a half on two cores,
          see docs/ablations.md. `:full_tiny` runs the ends of each sweep for a few updates.
Hardware: two CPU cores, 6 GB.
Writes:   a workdir for each stage and report/ under runs/quickstart/: open report/index.html.
"""

from configs import ablations, common, measured
from instructgpt_jax import simulated

SIZES = {  # layers, width, steps of pretraining, learning rate
    "small": (3, 128, 1536, 6e-3),
    "large": (4, 160, 256, 4e-3),
}
LARGE_STEPS = 2964  # of `:full`: as much text for each parameter as the small one reads, 1,536 · 1,401,280 / 726,144
TEXT = ("simulated:pretraining:train:100000",)
RAW = ("simulated:prompts:18000",)  # the same users as in the splits of all other records, see prompt_sets
DEMONSTRATIONS = ("simulated:demonstrations:train:2200", "jsonl:{workdir}/prompts/few_shot.jsonl.gz")
PROMPTS = ("jsonl:{workdir}/prompts/train.jsonl.gz",)
VALID = ("jsonl:{workdir}/prompts/valid.jsonl.gz#1/8",)  # a hundred
PTX_COEF = 1.0  # the paper has 27.8: so few updates of so small a policy hardly raise the score then
ANSWERS = {"max_prompt_length": 96, "response_length": 64}
TINY = {  # of `:tiny`
    "prompts.few_shot": ("simulated:few_shot:train:6",),
    "select.batch_size": 16,
    "select.num_samples": 2,
    "evaluate.num_prompts": 40,
    "evaluate.batch_size": 40,
    "evaluate.accuracy": ("simulated:comparisons:test:20",),
    "evaluate.pretraining.num_sequences": 32,
    "evaluate.tasks.cloze": ("simulated:cloze:test:40",),
    "evaluate.tasks.story": ("simulated:story:test:40",),
    "evaluate.prefix.candidates": simulated.prefixes()[:2],
    "evaluate.prefix.prompts": ("simulated:prompts:valid:20",),
    "evaluate.overoptimisation.prompts": ("simulated:prompts:valid:20",),
}


def get_config(arg=""):
    full, tiny = arg.startswith("full"), arg.endswith("tiny")
    stages = small()
    if arg != "tiny":
        stages |= control()
    models = [
        measured.Policy("pretrain", "base", "GPT", "base", "small"),
        measured.Policy("pretrain", "prefix", "GPT (prompted)", "prefix", "small"),
        measured.Policy("pretrain_large", "base_large", "GPT", "base", "large"),
        measured.Policy("select", "sft", "SFT", "sft", "small"),
        measured.Policy("ppo", "ppo", "PPO", "ppo", "small"),
        measured.Policy("ppo_ptx", "ppo_ptx", "PPO-ptx", "ppo_ptx", "small"),
        measured.Policy("select_flan", "flan", "FLAN", "flan", "small"),
        measured.Policy("select_t0", "t0", "T0", "t0", "small"),
        measured.Policy("ppo_control", "control", "PPO on shuffled rankings", "control", "small"),
    ]
    models = [model for model in models if model.stage in stages]
    if full:
        stages["pretrain_large"].pretrain.num_steps = LARGE_STEPS
        for more, named in (larger("large"), second_round()):
            stages |= more
            models += named
    if tiny:
        shrink(stages)
    last = {"evaluate": evaluation(stages, models)}
    if full:
        found = sweeps(stages)
        found = {name: ablations.ends(one) for name, one in found.items()} if tiny else found
        for one in found.values():
            stages |= one.stages
        last = {"sweeps": of_sweeps(found)} | last
        last["evaluate"].evaluate.sweep_report = "{workdir}/sweeps"
    if tiny:
        for stage in last.values():
            common.shrink(stage, TINY)
    return common.pipeline(stages | last)


def small():
    """The stages of the paper for one size, and the larger base model."""
    stages = {"prompts": prompt_sets(), "pretrain": pretraining("small")}
    stages["sft"] = fine_tuning("pretrain", batch_size=32, num_epochs=16, pretraining_fraction=0.0)
    stages["rlhf_init"] = rlhf_start("pretrain")
    stages["pretrain_large"] = pretraining("large")  # beside `collect`, whose sampling leaves a core half idle
    stages["collect"] = collection({"sft": "sft", "start": "rlhf_init"})
    stages["reward"] = ranking("sft", "collect")
    stages["folds"] = folds("sft", "collect")
    stages["ppo_ptx"] = policy("rlhf_init", "reward", ptx_coef=PTX_COEF)  # the longest of the three goes first
    stages["ppo"] = policy("rlhf_init", "reward", ptx_coef=0.0)
    stages["select"] = selection("sft", "reward")
    for name in ("flan", "t0"):  # last: they fill what the others leave idle
        stages[name] = public_tasks("pretrain", name)
        stages[f"select_{name}"] = selection(name, "reward")
    return stages


def control():
    """The negative control: what PPO gains when the rankings say nothing."""
    return {
        "reward_control": ranking("sft", "collect", "shuffled"),
        "ppo_control": policy("rlhf_init", "reward_control", ptx_coef=0.0),
    }


def prompt_sets():
    """The raw prompts without repeats, heavy users and personal information; some few-shot instructions."""
    config = common.prompt_sets()
    config.data.update({"prompts": RAW, "tokenizer": "train:1024", "pretraining": TEXT})
    config.prompts.update(simulated.SPLIT)  # so that a user is in the same split everywhere
    config.prompts.update(
        {
            "prefix_chars": 80,  # a prompt has 64 characters on average: the 200 of prompts.py would find nothing
            "max_tokens": 96,
            "language_sample": 500,
            "few_shot": ("simulated:few_shot:train:50",),
            "example": simulated.FEW_SHOT_EXAMPLE,
            "shots": 1,
            "shot_sets": 2,
        }
    )
    return config


def pretraining(size):
    """A base model."""
    layers, width, steps, lr = SIZES[size]
    config = common.config("pretrain")
    config.data.tokenizer = "{workdir}/prompts/tokenizer"
    config.data.pretraining = TEXT
    config.models.model = common.network(
        "tiny", num_layers=layers, width=width, num_heads=2, mlp_width=4 * width, max_length=512, positions="rotary"
    )
    config.pretrain = common.pretraining(lr, batch_size=16, num_steps=steps, row_length=128)
    config.pretrain.microbatch_rows = 4
    config.pretrain.optimizer.update({"algorithm": "muon", "warmup_steps": 100})
    config.eval_every = 0
    return config


def fine_tuning(base, batch_size, num_epochs, pretraining_fraction):
    """A stage that continues from a base model on demonstrations."""
    config = common.config("sft")
    config.models.model = common.network(init_from="{workdir}/" + base)
    config.models.model.residual_dropout = 0.1
    config.data.demonstrations = DEMONSTRATIONS
    if pretraining_fraction:
        config.data.pretraining = TEXT
    else:
        config.snapshot_every = -1
    config.sft = common.fine_tuning(1e-3, batch_size, num_epochs, pretraining_fraction)
    config.sft.update({"row_length": 128, "microbatch_rows": 2})
    return config


def rlhf_start(base):
    """Where PPO starts: demonstrations and a tenth of pretraining text."""
    # The paper has 2 epochs, which are 146 updates here: too few to answer with.
    config = fine_tuning(base, batch_size=32, num_epochs=12, pretraining_fraction=0.1)
    config.sft.optimizer.update({"algorithm": "muon", "lr": 3e-3})  # as good a start as 16 epochs of Adam
    return config


def public_tasks(base, name):
    """A baseline of section 3.5, FLAN or T0: each example once, the snapshot chosen by score."""
    config = fine_tuning(base, batch_size=32, num_epochs=1, pretraining_fraction=0.0)
    config.data.demonstrations = (f"simulated:{name}:train:8000",)
    config.sft.optimizer.update({"algorithm": "muon", "lr": 3e-3})
    config.eval_every = config.snapshot_every = 60
    return config


def collection(policies):
    """Completions of some policies, ranked by the training labelers."""
    config = common.collection()
    for name, stage in policies.items():
        config.models[name] = common.network(init_from="{workdir}/" + stage)
    config.data.prompts = PROMPTS
    config.data.max_prompt_tokens = 96
    config.collect.update(ANSWERS | {"num_prompts": 5000, "shuffled": True})
    return config


def ranking(start, comparisons, name="comparisons"):
    """A reward model on the comparisons of a stage."""
    config = common.config("reward")
    config.models.model = common.network(init_from="{workdir}/" + start)
    config.data.comparisons = (f"jsonl:{{workdir}}/{comparisons}/{name}.jsonl",)
    config.data.demonstrations = DEMONSTRATIONS
    config.data.skip_bad = 20  # completions too long for a row
    config.reward = common.rankings(lr=2e-3, batch_size=8)
    config.reward.optimizer.algorithm = "muon"
    config.reward.update({"row_length": 192, "microbatch_rows": 4})
    if name == "shuffled":
        config.reward.num_steps = 300  # there is nothing to learn
    else:
        config.data.comparisons += ("simulated:comparisons:train:2000",)
    return config


def folds(start, comparisons):
    """Small reward models on an eighth of the collected rankings, each without three of the twelve labelers."""
    config = ranking(start, comparisons)
    config.data.comparisons = (f"jsonl:{{workdir}}/{comparisons}/comparisons.jsonl#1/8",)
    config.data.demonstrations = ()  # only the order of scores counts
    config.data.valid_fraction = 0.2
    config.eval_every = 0
    config.reward.update({"folds": 4, "fold_by": "labeler", "fold_seeds": 3})
    config.reward.head_examples = 256  # some fifty updates are too few for a head at random
    return config


def selection(source, reward):
    """The snapshot of supervised fine-tuning whose answers have the best score."""
    config = common.selection()
    config.models.model = common.network(init_from="{workdir}/" + source)
    config.models.reward = common.network(init_from="{workdir}/" + reward)
    config.data.prompts = PROMPTS
    config.data.max_prompt_tokens = 96
    config.select.update(ANSWERS | {"batch_size": 256, "num_batches": 1, "row_length": 192, "num_samples": 4})
    return config


def policy(start, reward, ptx_coef, kl_coef=0.02, iterations=30):
    """PPO, or with a ptx_coef PPO-ptx."""
    config = common.ppo(policy_lr=2e-4, value_lr=1.5e-3, ptx_coef=ptx_coef)
    config.models.policy = common.network(init_from="{workdir}/" + start)
    config.models.reward = common.network(init_from="{workdir}/" + reward)
    config.data.prompts = PROMPTS
    config.data.pretraining = TEXT if ptx_coef else ()
    config.data.max_prompt_tokens = 96
    config.rollout.wave = 32  # what a CPU keeps in its caches
    config.snapshot_every = 10
    config.checkpoint.every = 10
    config.ppo.update(
        ANSWERS
        | {
            "iterations": iterations,
            "batch_size": 128,
            "num_minibatches": 4,
            "ema_decay": 0.9,  # over 10 updates: the paper's 0.992 is for 4,000
            "row_length": 192,
            "microbatch_rows": 2,
            "kl_coef": kl_coef,
            "ptx_ratio": 1,
            "ptx_row_length": 128,
            "ptx_microbatch_rows": 2,
        }
    )
    config.ppo.policy_optimizer.warmup_steps = 20
    return config


def second_round():
    """The paper's steps 2 and 3 again: comparisons of the present policy, a reward model on both rounds, a policy."""
    stages = {"round1/collect": collection({"policy": "ppo_ptx", "sft": "select"})}
    stages["round1/reward"] = ranking("sft", "round1/collect")
    stages["round1/reward"].data.comparisons += ("jsonl:{workdir}/collect/comparisons.jsonl",)
    stages["round1/ppo_ptx"] = policy("rlhf_init", "round1/reward", ptx_coef=PTX_COEF)
    return stages, [measured.Policy("round1/ppo_ptx", "ppo_ptx_round1", "PPO-ptx, second round", "ppo_ptx", "small")]


def sweeps(stages):
    """Appendix E.6 to E.11 of the paper: see ablations.py."""
    found = ablations.all_sweeps(stages["ppo"], stages["ppo_ptx"], "pretrain")
    text = stages["pretrain"].data.pretraining
    return found | {"start": ablations.starts(stages["rlhf_init"], stages["ppo_ptx"], text)}


def of_sweeps(found):
    """The evaluation of the sweeps alone, on validation prompts: every policy against SFT, not against each other."""
    beside = [
        measured.Policy("pretrain", "base", "GPT", "base", "small"),
        measured.Policy("rlhf_init", "start", "start of PPO", "sft", "small"),
        measured.Policy("select", "sft", "SFT", "sft", "small"),
        measured.Policy("ppo", "ppo", "PPO", "ppo", "small"),
        measured.Policy("ppo_ptx", "ppo_ptx", "PPO-ptx", "ppo_ptx", "small"),
    ]
    models = beside + [policy for one in found.values() for policy in one.named]
    config = measured.evaluation("The settings of PPO", {"reward": "reward", "ref_policy": "rlhf_init"}, models)
    config.data.pretraining = ("simulated:pretraining:valid:3000",)
    config.data.max_prompt_tokens = 96
    own = {
        "distributions": {"instruct": ("jsonl:{workdir}/prompts/valid.jsonl.gz",)},  # seven hundred
        "labelers": True,
        "tasks": {"cloze": ("simulated:cloze:valid:200",), "story": ("simulated:story:valid:200",)},
        "sweeps": ablations.section(found, tuple(policy.name for policy in beside)),
        "row_length": 192,
        "num_samples": 0,
        "seconds": "",
        "report": "",
    }
    config.evaluate.update(ANSWERS | own)
    return config


def larger(size):
    """The policies of a larger size, with the reward model of the small one: the paper has one of 6B for all."""
    stages, models = {}, []
    stages[f"sft_{size}"] = fine_tuning(f"pretrain_{size}", batch_size=32, num_epochs=16, pretraining_fraction=0.0)
    stages[f"select_{size}"] = selection(f"sft_{size}", "reward")
    stages[f"rlhf_init_{size}"] = rlhf_start(f"pretrain_{size}")
    models.append(measured.Policy(f"select_{size}", f"sft_{size}", "SFT", "sft", size))
    for name, label, coef in (("ppo", "PPO", 0.0), ("ppo_ptx", "PPO-ptx", PTX_COEF)):
        stages[f"{name}_{size}"] = policy(f"rlhf_init_{size}", "reward", ptx_coef=coef)
        models.append(measured.Policy(f"{name}_{size}", f"{name}_{size}", label, name, size))
    return stages, models


def evaluation(stages, models):
    """Every policy on both distributions of prompts of users that training never saw."""
    frozen = {"reward": "reward", "ref_policy": "rlhf_init"}
    config = measured.evaluation("InstructGPT on a tiny world", frozen, models)
    config.data.pretraining = ("simulated:pretraining:test:3000",)
    config.data.max_prompt_tokens = 96
    own = {
        "distributions": {
            "instruct": ("jsonl:{workdir}/prompts/test.jsonl.gz",),
            "gpt": ("simulated:gpt_prompts:test:1600",),
        },
        "num_prompts": 1000,
        "labelers": True,
        "tasks": {"cloze": ("simulated:cloze:test:200",), "story": ("simulated:story:test:200",)},
        "accuracy": ("simulated:comparisons:test:300", "simulated:comparisons_heldout:test:300"),
        "prefix": {
            "candidates": simulated.prefixes(),
            "prompts": VALID,
            "max_length": 128,
        },
        "overoptimisation": {
            "runs": {name: "{workdir}/" + name for name in ("ppo", "ppo_ptx")},
            "prompts": VALID,
        },
        "curves": {
            name.replace("/", "_"): "{workdir}/" + name
            for name, stage in stages.items()
            if stage.stage in ("pretrain", "sft", "reward", "ppo") and name != "folds"
        },
        "prompt_sets": "{workdir}/prompts",
        "folds": "{workdir}/folds",
        "row_length": 192,
    }
    config.evaluate.update(ANSWERS | own)
    return config


def shrink(stages):
    """A few updates of small networks on few records."""
    for stage in stages.values():
        common.shrink(stage, TINY)
        if stage.stage == "pretrain":
            stage.models.model.update({"num_layers": 2, "width": 64, "mlp_width": 128})
        if stage.stage == "select":
            stage.rollout.wave = 16
        for kind, size in {"pretraining": 2000, "demonstrations": 300, "comparisons": 100}.items():
            stage.data[kind] = tuple(
                f"simulated:{source.split(':')[1]}:train:{size}" if source.startswith("simulated:") else source
                for source in stage.data[kind]
            )
    stages["prompts"].data.prompts = ("simulated:prompts:800",)
    stages["folds"].data.comparisons = ("jsonl:{workdir}/collect/comparisons.jsonl",)
    if "reward_control" in stages:
        stages["reward_control"].reward.num_steps = 4  # one epoch of what `collect` has ranked
    stages["folds"].reward.update({"folds": 2, "fold_seeds": 2, "num_steps": 0})
