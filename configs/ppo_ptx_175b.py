"""PPO-ptx with a policy of 175B parameters: InstructGPT.

Paper:    appendix C.4: 256k episodes = 500 iterations of 512, 8 minibatches of 64, KL coefficient 0.02, clip 0.2, EMA
          0.992, 6B reward and value models, 8 pretraining sequences an episode with coefficient 27.8.
Rates:    policy 2.55e-6 (the better of the two tried, appendix E.9), value 5e-6.
Command:  python -m instructgpt_jax.main --config=configs/ppo_ptx_175b.py --config.data.prompts=jsonl:FILES \
              --config.data.pretraining=jsonl:FILES
Starts:   from runs/rlhf_init_175b (configs/rlhf_init_175b.py) and runs/reward_6b (configs/reward_6b.py).
Hardware: about 4 TB for the four networks: 64 or more TPU v5p, or 128 GPUs of 80 GB.
Expected: objective/score rises over the 500 iterations. The paper's alignment tax is mostly repaired: HellaSwag above
          GPT-3, SQuADv2, DROP and translation closer to it than with PPO (section 4.2, figure 29). Here ptx/loss
          shows the tax; the four benchmarks are not measured.
"""

from configs import common


def get_config(arg=""):
    config = common.ppo(policy_lr=2.55e-6, value_lr=5e-6, ptx_coef=27.8)
    config.mesh.update({"data": 1, "fsdp": -1, "tensor": 8})
    config.models.policy = common.network(init_from="runs/rlhf_init_175b", dtype="bfloat16", remat="full")
    config.models.reward = common.network(init_from="runs/reward_6b", dtype="bfloat16", remat="full")
    return common.shrink(config) if arg == "tiny" else config
