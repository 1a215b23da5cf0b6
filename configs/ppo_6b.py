"""PPO without the pretraining term, with a policy of 6B parameters.

Paper:    appendix C.4: 256k episodes = 500 iterations of 512, 8 minibatches of 64, KL coefficient 0.02, clip 0.2, EMA
          0.992, 6B reward and value models; ptx_coef 0.
Rates:    policy 8e-6: without ptx every run above 8.05e-6 diverged (appendix E.9). Value 9e-6.
Command:  python -m instructgpt_jax.main --config=configs/ppo_6b.py --config.data.prompts=jsonl:FILES
Starts:   from runs/rlhf_init_6b (configs/rlhf_init_6b.py) and runs/reward_6b (configs/reward_6b.py).
Hardware: about 270 GB for the four networks: 8 GPUs of 80 GB, or 8 TPU v5p.
Expected: objective/score rises over the 500 iterations. The paper's alignment tax: SQuADv2, DROP, HellaSwag and
          translation fall (section 4.2, figure 29). Here the loss on pretraining text shows the tax; the four
          benchmarks are not measured.
"""

from configs import common


def get_config(arg=""):
    config = common.ppo(policy_lr=8e-6, value_lr=9e-6, ptx_coef=0.0)
    config.models.policy = common.network(init_from="runs/rlhf_init_6b", dtype="bfloat16", remat="full")
    config.models.reward = common.network(init_from="runs/reward_6b", dtype="bfloat16", remat="full")
    return common.shrink(config) if arg == "tiny" else config
