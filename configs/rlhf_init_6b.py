"""The policy of 6B parameters that starts RLHF: not the SFT baseline.

Paper:    appendix C.3: 2 epochs on the demonstrations with 10 % pretraining data, lr 1.04e-5, batch 32, cosine to 10 %.
          It is also the KL reference. The paper does not say what the 10 % are of (here: of the loss, see
          instructgpt_jax/stages/sft.py), nor the dropout (here: none).
Command:  python -m instructgpt_jax.main --config=configs/rlhf_init_6b.py --config.data.demonstrations=jsonl:FILES \
              --config.data.pretraining=jsonl:FILES
Model:    GPT-J 6B stands in for GPT-3 6.7B, which is not public.
Hardware: 107 GB of parameters, gradients and moments: 4 GPUs of 80 GB, or 4 TPU v5p.
Expected: about 880 updates on the paper's 12,725 demonstrations. Appendix E.8: 10 % is slightly better than 0 or 50
          %, and PPO is not sensitive to it.
"""

from configs import common


def get_config(arg=""):
    config = common.config("sft")
    config.models.model = common.network(init_from="EleutherAI/gpt-j-6b", dtype="bfloat16", remat="full")
    config.sft = common.fine_tuning(lr=1.04e-5, batch_size=32, num_epochs=2, pretraining_fraction=0.1)
    return common.shrink(config) if arg == "tiny" else config
