"""The three steps of the paper on the embedded world: no download, no GPU.

Paper:    figure 2: a base model, supervised fine-tuning, a reward model on K = 4 to 9 ranked completions, PPO and
          PPO-ptx.
Command:  python -m instructgpt_jax.main --config=configs/quickstart.py
          One stage alone: --config.only=reward. `:tiny` runs every stage for a few updates.
Hardware: two CPU cores.
Writes:   a workdir for each stage under runs/quickstart/; compare objective/score and valid/kl of `ppo` and `ppo_ptx`.
"""

from ml_collections import ConfigDict

from configs import common

STAGES = ("pretrain", "sft", "rlhf_init", "reward", "ppo", "ppo_ptx")


def get_config(arg=""):
    stages = {}
    stages["pretrain"] = common.config("pretrain")
    stages["pretrain"].data.tokenizer = "train:1024"
    stages["pretrain"].models.model = common.network(
        "tiny", num_layers=4, width=160, num_heads=4, mlp_width=640, max_length=512
    )
    stages["pretrain"].pretrain = {
        "batch_size": 64,
        "num_epochs": 0,
        "num_steps": 800,
        "row_length": 128,
        "microbatch_rows": 64,
        "optimizer": common.optimizer(2e-3, "cosine", warmup_steps=40, weight_decay=0.1),
    }
    stages["pretrain"].eval_every = 200

    stages["sft"] = fine_tuning(num_epochs=8, pretraining_fraction=0.0)
    stages["sft"].models.model.residual_dropout = 0.1
    stages["sft"].snapshot_every = -1
    stages["rlhf_init"] = fine_tuning(num_epochs=2, pretraining_fraction=0.1)

    stages["reward"] = common.config("reward")
    stages["reward"].models.model = common.network(init_from="{workdir}/sft")
    stages["reward"].reward = common.rankings(lr=5e-4, batch_size=32)
    stages["reward"].reward.update({"row_length": 512, "microbatch_rows": 16})

    for name, ptx_coef in (("ppo", 0.0), ("ppo_ptx", 27.8)):
        stages[name] = common.ppo(policy_lr=3e-5, value_lr=1e-4, ptx_coef=ptx_coef)
        stages[name].models.policy = common.network(init_from="{workdir}/rlhf_init")
        stages[name].models.reward = common.network(init_from="{workdir}/reward")
        stages[name].rollout.wave = 0
        stages[name].data.max_prompt_tokens = 96
        stages[name].ppo.update(
            {
                "iterations": 60,
                "batch_size": 128,
                "max_prompt_length": 96,
                "response_length": 64,
                "row_length": 192,
                "microbatch_rows": 32,
                "ptx_ratio": 1,
                "ptx_row_length": 128,
                "ptx_microbatch_rows": 32,
            }
        )
    for stage in stages.values():
        for kind in ("demonstrations", "comparisons", "prompts", "pretraining"):
            stage.data[kind] = (f"simulated:{kind}:train" + ":100000" * (kind == "pretraining" and arg != "tiny"),)
        if arg == "tiny":
            shrink(stage)
    return ConfigDict({"stage": "pipeline", "only": "", "order": STAGES, "stages": stages})


def fine_tuning(num_epochs, pretraining_fraction):
    """A stage that continues from the base model on demonstrations."""
    config = common.config("sft")
    config.models.model = common.network(init_from="{workdir}/pretrain")
    config.sft = common.fine_tuning(5e-4, 32, num_epochs, pretraining_fraction)
    config.sft.update({"row_length": 256, "microbatch_rows": 16})
    return config


def shrink(config):
    """A few updates of a network of 170 thousand parameters."""
    config.log_every = 1
    config.checkpoint.every = 4
    if config.stage == "pretrain":
        config.models.model = common.network("tiny", max_length=512)
        config.pretrain.update({"num_steps": 8, "batch_size": 8, "microbatch_rows": 8})
        config.pretrain.optimizer.warmup_steps = 2
    elif config.stage == "ppo":
        config.eval_every = 2
        config.ppo.update({"iterations": 4, "batch_size": 32, "num_minibatches": 4})
        config.ppo.policy_optimizer.warmup_steps = 4
    else:
        config[config.stage].update({"num_steps": 8, "batch_size": 8})
