"""Completions of policies to prompts, for people to rank (configs/label.py).

Paper:    section 3.5: K = 4 to 9 outputs of a prompt; most are of SFT models, some of PPO models (section 3.1).
Command:  python -m instructgpt_jax.main --config=configs/collect.py --config.data.prompts=jsonl:prompts.jsonl
Starts:   from runs/sft_1b3 and runs/ppo_ptx_1b3, which take turns; `--config.collect.labelers="('training',)"` has the
          simulated labelers rank what they wrote.
Hardware: the policies in bfloat16, without optimisers: one 80 GB GPU.
Expected: unranked.jsonl. With --config.collect.completions="(2, 2)" each prompt gets an answer of each policy, as an
          evaluation by people wants it.
"""

from configs import common


def get_config(arg=""):
    config = common.collection()
    for name in ("sft", "ppo_ptx"):
        config.models[name] = common.network(init_from=f"runs/{name}_1b3", dtype="bfloat16")
    config.collect.labelers = ()
    return common.shrink(config) if arg == "tiny" else config
