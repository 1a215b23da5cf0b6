"""Which epoch of an SFT run to keep.

Paper:    appendix C.1: the snapshot whose answers to validation prompts have the best mean score of the 6B reward
          model; it predicts human preference better than validation loss does (`--config.select.by=loss`).
Command:  python -m instructgpt_jax.main --config=configs/select.py --config.models.model.init_from=runs/sft_1b3 \
              --config.data.prompts=jsonl:FILES --workdir=runs/sft_1b3_selected
Starts:   from an SFT workdir with snapshots, and runs/reward_6b (configs/reward_6b.py).
Hardware: the SFT model and the reward model in bfloat16, without optimisers: one 80 GB GPU for 1.3B and 6B.
Expected: in the paper a later epoch than that of the lowest validation loss. init_from=runs/sft_1b3_selected loads
          the choice.
"""

from configs import common


def get_config(arg=""):
    config = common.selection()
    config.models.model = common.network(init_from="runs/sft_1b3", dtype="bfloat16")
    config.models.reward = common.network(init_from="runs/reward_6b", dtype="bfloat16")
    return common.shrink(config) if arg == "tiny" else config
