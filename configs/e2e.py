"""InstructGPT from public human rankings: restaurant descriptions from meaning representations, on two CPU cores.

Paper:    the three steps of figure 2 at the smallest scale where every label is human: demonstrations of the E2E
          challenge (Novikova et al. 2017) and RankME rankings of five systems' texts (Novikova et al. 2018).
Command:  python -m instructgpt_jax.main --config=configs/e2e.py --config.demonstrations=jsonl:DEMONSTRATIONS \
              --config.comparisons=jsonl:RANKINGS --config.text=jsonl:TEXT
          docs/e2e.md says where to get them. One stage alone: --config.only=reward. Another seed: --config.seed=1.
          `:tiny` runs every stage for a few updates on the simulated world, without files.
Hardware: two CPU cores.
Writes:   a workdir for each stage and report/ under runs/e2e/.

An eighth of the meaning representations is held out of every stage, by prompt. The reward model of PPO and the judge
learn from halves of the rankings that share no prompt.
"""

from ml_collections import ConfigDict, config_dict

from configs import common

STAGES = ("pretrain", "sft", "rlhf_init", "reward", "judge", "ppo", "ppo_ptx")  # of training
HELD_OUT = 0.12  # of the meaning representations
CONTEXT = 384  # tokens
PROMPT, RESPONSE = 80, 72  # tokens: the longest meaning representation has 64, the longest text 67


def get_config(arg=""):
    stages = {}
    stages["pretrain"] = common.config("pretrain")
    stages["pretrain"].data.tokenizer = "train:2048"
    stages["pretrain"].models.model = fresh()
    stages["pretrain"].pretrain = {
        "batch_size": 16,
        "num_epochs": 0,
        "num_steps": 2048,
        "row_length": 128,
        "microbatch_rows": 4,
        "optimizer": common.optimizer(6e-3, "cosine", algorithm="muon", warmup_steps=100, weight_decay=0.1),
    }
    stages["pretrain"].eval_every = 512

    stages["sft"] = fine_tuning(num_epochs=8, pretraining_fraction=0.0)
    stages["rlhf_init"] = fine_tuning(num_epochs=12, pretraining_fraction=0.1)
    stages["rlhf_init"].sft.pretraining_fraction_of = "examples"  # about a third of the loss tokens: docs/e2e.md

    stages["reward"] = ranking(part=1)
    stages["judge"] = ranking(part=2)

    stages["ppo"] = policy(ptx_coef=0.0)
    stages["ppo_ptx"] = policy(ptx_coef=2.0)  # 27.8 is for large models: here it drowns the gradient of PPO
    stages["evaluate"] = evaluation()
    seed = config_dict.FieldReference(0)
    for name, stage in stages.items():
        stage.seed = seed + 1000 if name == "judge" else seed
        stage.data.valid_fraction = HELD_OUT
        sources(stage, tiny=arg == "tiny")
        if arg == "tiny":
            shrink(stage)
    return ConfigDict(
        {
            "stage": "pipeline",
            "only": "",
            "parallel": 2,  # stages at once, on a CPU
            "seed": seed,
            "demonstrations": "",  # {"prompt": meaning representation, "completion": text}
            "comparisons": "",  # {"prompt", "completions", "ranking"}
            "text": "",  # {"text"}: what the base model reads besides the texts of the demonstrations
            "order": (*STAGES, "evaluate"),
            "stages": stages,
        }
    )


def fresh():
    """The shape of all networks: 1.1 million parameters."""
    return common.network("tiny", num_layers=4, width=128, num_heads=2, mlp_width=512, max_length=CONTEXT)


def fine_tuning(num_epochs, pretraining_fraction):
    """A stage that continues from the base model on demonstrations."""
    config = common.config("sft")
    config.models.model = common.network(init_from="{workdir}/pretrain", residual_dropout=0.1)
    config.sft = common.fine_tuning(1e-3, 16, num_epochs, pretraining_fraction)
    config.sft.update({"row_length": 160, "microbatch_rows": 4})
    return config


def ranking(part):
    """A reward model on one half of the rankings."""
    config = common.config("reward")
    config.models.model = common.network(init_from="{workdir}/sft", residual_dropout=0.1)
    config.reward = common.rankings(lr=4e-4, batch_size=16)
    config.reward.update({"num_epochs": 2, "max_completions": 5, "row_length": 256, "microbatch_rows": 4})
    config.reward.update({"eos_init": ".", "head_examples": 2000})  # right more often on unseen prompts: docs/e2e.md
    config.data.comparisons = (f"{{comparisons}}#{part}/2",)
    return config


def policy(ptx_coef):
    """PPO, or with a ptx_coef PPO-ptx."""
    config = common.ppo(policy_lr=1e-4, value_lr=3e-4, ptx_coef=ptx_coef)
    config.models.policy = common.network(init_from="{workdir}/rlhf_init")
    config.models.reward = common.network(init_from="{workdir}/reward")
    config.data.max_prompt_tokens = PROMPT
    config.rollout.wave = 0
    config.eval_every = 8
    config.snapshot_every = 8
    config.ppo.update(
        {
            "iterations": 48,
            "batch_size": 128,
            "num_minibatches": 4,
            "kl_coef": 0.2,  # ten times the paper's: the reward model of 400 comparisons is soon exploited
            "max_prompt_length": PROMPT,
            "response_length": RESPONSE,
            "row_length": PROMPT + RESPONSE,
            "microbatch_rows": 4,
            "ema_decay": 0.95,  # the run is short
            "ptx_ratio": 1,
            "ptx_row_length": 128,
            "ptx_microbatch_rows": 4,
        }
    )
    config.ppo.policy_optimizer.warmup_steps = 20
    return config


def evaluation():
    """The policies on the meaning representations that no stage has seen."""
    config = common.config("evaluate")
    for name, stage in (("reward", "reward"), ("judge", "judge"), ("ref_policy", "rlhf_init")):
        config.models[name] = common.network(init_from="{workdir}/" + stage)
    models = {}
    for name, (label, method) in {
        "pretrain": ("base", "base"),
        "sft": ("SFT", "sft"),
        "rlhf_init": ("start of PPO", "sft"),
        "ppo": ("PPO", "ppo"),
        "ppo_ptx": ("PPO-ptx", "ppo_ptx"),
    }.items():
        config.models[name] = common.network(init_from="{workdir}/" + name)
        models[name] = {"label": label, "method": method, "size": "1.1M", "model": name, "prefix": False}
    config.data.max_prompt_tokens = PROMPT
    config.evaluate = {
        "title": "E2E: descriptions of restaurants, from human rankings",
        "models": models,
        "order": tuple(models),
        "baseline": "sft",
        "distributions": {"e2e": ("{demonstrations}",)},
        "num_prompts": 0,
        "answers_per_prompt": 4,  # one to each of 119 prompts leaves 3 points of BLEU to chance
        "split": "valid",
        "labelers": False,
        "references": ("{demonstrations}",),
        "slots": True,
        "tasks": {},
        "accuracy": ("{comparisons}",),
        "pretraining": {"num_sequences": 512, "row_length": 128},
        "prefix": {"candidates": (), "prompts": (), "max_length": 0},
        "overoptimisation": {
            "runs": {"ppo": "{workdir}/ppo", "ppo_ptx": "{workdir}/ppo_ptx"},
            "prompts": ("{demonstrations}",),
        },
        "curves": {name: "{workdir}/" + name for name in STAGES},
        "parallel": 2,  # policies at once, on a CPU
        "batch_size": 128,
        "max_prompt_length": PROMPT,
        "response_length": RESPONSE,
        "row_length": PROMPT + RESPONSE,
        "microbatch_rows": 4,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "num_samples": 8,
        "seconds": "{workdir}/seconds.json",
        "report": "{workdir}/report",
    }
    return config


def sources(config, tiny):
    """Fills in where the records of a stage come from."""
    demonstrations, text = "{demonstrations}", "{text}"
    config.data.demonstrations = (demonstrations,)
    config.data.comparisons = config.data.comparisons or ("{comparisons}",)
    config.data.prompts = (f"{demonstrations}#unique",)
    config.data.pretraining = (f"{demonstrations}#text=completion@0.35", f"{text}@0.65")
    if tiny:
        for kind in ("demonstrations", "comparisons", "prompts", "pretraining"):
            config.data[kind] = (f"simulated:{kind}:train",)
        if config.stage == "evaluate":
            own = config.evaluate
            own.distributions.e2e = own.overoptimisation.prompts = ("simulated:prompts:train:400",)
            own.references, own.accuracy = (), ("simulated:comparisons:train:100",)


def shrink(config):
    """A few updates of a network of 170 thousand parameters."""
    config.log_every = 1
    config.checkpoint.every = 4
    config[config.stage].microbatch_rows = 8
    if config.stage == "pretrain":
        config.models.model = common.network("tiny", max_length=CONTEXT)
        config.pretrain.update({"num_steps": 8, "batch_size": 8, "microbatch_rows": 8})
        config.pretrain.optimizer.warmup_steps = 2
    elif config.stage == "ppo":
        config.eval_every = config.snapshot_every = 2
        config.ppo.update({"iterations": 4, "batch_size": 32, "ptx_microbatch_rows": 8})
        config.ppo.policy_optimizer.warmup_steps = 4
    elif config.stage == "evaluate":
        config.evaluate.update({"slots": False, "num_samples": 2})
        config.evaluate.pretraining.num_sequences = 16
    else:
        config[config.stage].update({"num_steps": 8, "batch_size": 8, "row_length": 256})
        if config.stage == "reward":
            config.reward.update({"max_completions": 9, "row_length": CONTEXT, "head_examples": 64})
