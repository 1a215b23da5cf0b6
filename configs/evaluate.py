"""Policies compared by what people prefer, and by what a machine can say of their answers: one report.

Paper:    sections 3.6 and 4.1: win rates against the SFT model, ratings from 1 to 7 and the fields of table 3, by
          prompts and labelers (figures 1, 3, 4 and 5).
Command:  python -m instructgpt_jax.main --config=configs/evaluate.py --workdir=runs/report \
              --config.evaluate.distributions.instruct="('jsonl:prompts.jsonl',)" \
              --config.evaluate.rankings="('jsonl:runs/ranked/comparisons.jsonl',)" \
              --config.evaluate.ratings="('jsonl:runs/ranked/ratings.jsonl',)"
          The two files are of stage `label` (docs/labeling.md). Without them the reward model alone judges, and the
          report says so.
Starts:   from runs/sft_1b3 and runs/ppo_ptx_1b3, with runs/reward_6b and the reference runs/rlhf_init_1b3.
Hardware: the networks in bfloat16, without optimisers: one 80 GB GPU.
Expected: report/index.html. In the paper 1.3B PPO-ptx wins 52 % against 175B SFT, where 1.3B SFT wins 35 %.
"""

from configs import common, measured

POLICIES = (
    measured.Policy("sft_1b3", "sft", "SFT", "sft", "1.3B"),
    measured.Policy("ppo_ptx_1b3", "ppo_ptx", "PPO-ptx", "ppo_ptx", "1.3B"),
)


def get_config(arg=""):
    config = measured.evaluation("Judged by people", {"reward": "reward_6b", "ref_policy": "rlhf_init_1b3"}, POLICIES)
    for entry in config.models.values():
        entry.update({"init_from": entry.init_from.replace("{workdir}", "runs"), "dtype": "bfloat16"})
    config.evaluate.update(
        {
            "distributions": {"instruct": ("jsonl:prompts.jsonl",)},
            "preferences": ("reward",),
            "pretraining": {"num_sequences": 0, "row_length": 128},
            "seconds": "",
            "report": "",
        }
    )
    if arg == "tiny":
        common.shrink(config)
        config.evaluate.update(
            {
                "distributions": {"instruct": ("simulated:prompts:test:40",)},
                "num_prompts": 20,
                "max_prompt_length": 96,
                "response_length": 32,
                "row_length": 128,
            }
        )
    return config
