"""PPO-ptx with a policy of 1.3B parameters: InstructGPT.

Paper:    appendix C.4: 256k episodes = 500 iterations of 512, 8 minibatches of 64, KL coefficient 0.02, clip 0.2, EMA
          0.992, 6B reward and value models, 8 pretraining sequences an episode with coefficient 27.8.
Rates:    policy 1e-5: not printed in the paper; near the best of its sweep 2.55e-6 … 2.55e-5 (appendix E.9, figure
          38). Value 9e-6.
Command:  python -m instructgpt_jax.main --config=configs/ppo_ptx_1b3.py --config.data.prompts=jsonl:FILES \
              --config.data.pretraining=jsonl:FILES
Sweep:    python -m instructgpt_jax.sweep --config=configs/ppo_ptx_1b3.py --key=ppo.policy_optimizer.lr \
              --values=2.55e-6:2.55e-5:7 --metric=valid/score [--config.KEY=VALUE …]   (the paper's grid)
Starts:   from runs/rlhf_init_1b3 (configs/rlhf_init_1b3.py) and runs/reward_6b (configs/reward_6b.py).
Hardware: 150 GB for the four networks: 4 GPUs of 80 GB, or 4 TPU v5p.
Expected: objective/score rises over the 500 iterations. The paper's alignment tax is mostly repaired: HellaSwag above
          GPT-3, SQuADv2, DROP and translation closer to it than with PPO (section 4.2, figure 29). Here ptx/loss
          shows the tax; the four benchmarks are not measured.
"""

from configs import common


def get_config(arg=""):
    config = common.ppo(policy_lr=1e-5, value_lr=9e-6, ptx_coef=27.8)
    config.models.policy = common.network(init_from="runs/rlhf_init_1b3", dtype="bfloat16", remat="full")
    config.models.reward = common.network(init_from="runs/reward_6b", dtype="bfloat16", remat="full")
    return common.shrink(config) if arg == "tiny" else config
