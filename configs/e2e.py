"""InstructGPT from public human rankings: restaurant descriptions from meaning representations, on two CPU cores.

Paper:    the three steps of figure 2 at the smallest scale where every label is human: demonstrations of the E2E
          challenge (Novikova et al. 2017) and RankME rankings of five systems' texts (Novikova et al. 2018).
Command:  python -m instructgpt_jax.main --config=configs/e2e.py --config.demonstrations=jsonl:DEMONSTRATIONS \
              --config.comparisons=jsonl:RANKINGS --config.text=jsonl:TEXT
          docs/e2e.md says where to get them. One stage alone: --config.only=reward. `:tiny` runs every stage for a few
          updates on the simulated world, without files.
Hardware: two CPU cores.
Writes:   a workdir for each stage and report/ under runs/e2e/.

A twelfth of the meaning representations is held out of every stage, by prompt. The reward model of PPO and the judge
learn from halves of the rankings that share no prompt.
"""

from ml_collections import ConfigDict

from configs import common

STAGES = ("pretrain", "sft", "rlhf_init", "reward", "judge", "ppo", "ppo_ptx")
HELD_OUT = 0.12  # of the meaning representations
CONTEXT = 384  # a prompt with five texts


def get_config(arg=""):
    stages = {}
    stages["pretrain"] = common.config("pretrain")
    stages["pretrain"].data.tokenizer = "train:2048"
    stages["pretrain"].models.model = common.network(
        "tiny", num_layers=4, width=128, num_heads=4, mlp_width=512, max_length=CONTEXT
    )
    stages["pretrain"].pretrain = {
        "batch_size": 32,
        "num_epochs": 0,
        "num_steps": 600,
        "row_length": 128,
        "microbatch_rows": 4,
        "optimizer": common.optimizer(3e-3, "cosine", warmup_steps=40, weight_decay=0.1),
    }
    stages["pretrain"].eval_every = 300

    stages["sft"] = fine_tuning(num_epochs=4, pretraining_fraction=0.0)
    stages["sft"].models.model.residual_dropout = 0.1
    stages["rlhf_init"] = fine_tuning(num_epochs=2, pretraining_fraction=0.1)

    stages["reward"] = ranking(part=1, seed=0)
    stages["judge"] = ranking(part=2, seed=1)

    for name, ptx_coef in (("ppo", 0.0), ("ppo_ptx", 27.8)):
        stages[name] = common.ppo(policy_lr=3e-5, value_lr=1e-4, ptx_coef=ptx_coef)
        stages[name].models.policy = common.network(init_from="{workdir}/rlhf_init")
        stages[name].models.reward = common.network(init_from="{workdir}/reward")
        stages[name].rollout.wave = 0
        stages[name].data.max_prompt_tokens = 80
        stages[name].ppo.update(
            {
                "iterations": 60,
                "batch_size": 128,
                "max_prompt_length": 80,
                "response_length": 72,
                "row_length": 160,
                "microbatch_rows": 4,
                "ptx_ratio": 1,
                "ptx_row_length": 128,
                "ptx_microbatch_rows": 4,
            }
        )
    for stage in stages.values():
        stage.data.valid_fraction = HELD_OUT
        sources(stage, tiny=arg == "tiny")
        if arg == "tiny":
            shrink(stage)
    return ConfigDict(
        {
            "stage": "pipeline",
            "only": "",
            "demonstrations": "",  # {"prompt": meaning representation, "completion": text}
            "comparisons": "",  # {"prompt", "completions", "ranking"}
            "text": "",  # {"text"}: what the base model reads besides the texts of the demonstrations
            "order": STAGES,
            "stages": stages,
        }
    )


def fine_tuning(num_epochs, pretraining_fraction):
    """A stage that continues from the base model on demonstrations."""
    config = common.config("sft")
    config.models.model = common.network(init_from="{workdir}/pretrain")
    config.sft = common.fine_tuning(5e-4, 32, num_epochs, pretraining_fraction)
    config.sft.update({"row_length": 160, "microbatch_rows": 4})
    return config


def ranking(part, seed):
    """A reward model on one half of the rankings."""
    config = common.config("reward")
    config.seed = seed
    config.models.model = common.network(init_from="{workdir}/sft", residual_dropout=0.1)
    config.reward = common.rankings(lr=3e-4, batch_size=32)
    config.reward.update({"num_epochs": 4, "max_completions": 5, "row_length": CONTEXT, "microbatch_rows": 4})
    config.data.comparisons = (f"{{comparisons}}#{part}/2",)
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


def shrink(config):
    """A few updates of a network of 170 thousand parameters."""
    config.log_every = 1
    config.checkpoint.every = 4
    if config.stage == "pretrain":
        config.models.model = common.network("tiny", max_length=CONTEXT)
        config.pretrain.update({"num_steps": 8, "batch_size": 8, "microbatch_rows": 8})
        config.pretrain.optimizer.warmup_steps = 2
    elif config.stage == "ppo":
        config.eval_every = 2
        config.ppo.update({"iterations": 4, "batch_size": 32, "num_minibatches": 4})
        config.ppo.policy_optimizer.warmup_steps = 4
    else:
        config[config.stage].update({"num_steps": 8, "batch_size": 8})
