"""The SFT baseline of 6B parameters.

Paper:    appendix C.1: 16 epochs, lr 9.65e-6, batch 32, cosine to 10 % without warm-up, residual dropout 0.2. The
          epoch is chosen afterwards by the reward model's score of its answers (`configs/select.py`), so every epoch
          leaves a snapshot.
Command:  python -m instructgpt_jax.main --config=configs/sft_6b.py --config.data.demonstrations=jsonl:FILES
Model:    GPT-J 6B stands in for GPT-3 6.7B, which is not public. Dropout 0.2 is the paper's, for GPT-3. A model that
          was trained without dropout may not bear it; the run then says so at its start, and
          --config.models.model.residual_dropout=0 turns it off.
Hardware: 107 GB of parameters, gradients and moments: 4 GPUs of 80 GB, or 4 TPU v5p.
Expected: about 6,360 updates on the paper's 12,725 demonstrations; validation loss rises after the first epoch while
          the reward model's score goes on rising (section 3.5).
"""

from configs import common


def get_config(arg=""):
    config = common.config("sft")
    config.snapshot_every = -1
    config.models.model = common.network(init_from="EleutherAI/gpt-j-6b", dtype="bfloat16", remat="full")
    config.models.model.residual_dropout = 0.2
    config.sft = common.fine_tuning(lr=9.65e-6, batch_size=32, num_epochs=16, pretraining_fraction=0.0)
    return common.shrink(config) if arg == "tiny" else config
