"""The SFT baseline of 175B parameters.

Paper:    appendix C.1: 16 epochs, lr 5.03e-6, batch 8, cosine to 10 % without warm-up, residual dropout 0.2. The
          epoch is chosen afterwards by the reward model's score of its answers (`configs/select.py`), so every epoch
          leaves a snapshot.
Command:  python -m instructgpt_jax.main --config=configs/sft_175b.py \
              --config.models.model.init_from=DIR --config.data.demonstrations=jsonl:FILES
Model:    no public one has this shape: init_from=DIR is a checkpoint of yours; without it the weights are fresh.
Hardware: 2.8 TB of parameters, gradients and moments: 64 TPU v5p (fsdp 8 x tensor 8) or 64 GPUs of 80 GB.
Expected: about 25,450 updates on the paper's 12,725 demonstrations; validation loss rises after the first epoch while
          the reward model's score goes on rising (section 3.5).
"""

from configs import common


def get_config(arg=""):
    config = common.config("sft")
    config.snapshot_every = -1
    config.mesh.update({"data": 1, "fsdp": 8, "tensor": -1})  # 8 examples: no more batch shards than that
    config.data.tokenizer = "openai-community/gpt2"
    config.models.model = common.network("gpt3-175b", dtype="bfloat16", remat="full")
    config.models.model.residual_dropout = 0.2
    config.sft = common.fine_tuning(lr=5.03e-6, batch_size=8, num_epochs=16, pretraining_fraction=0.0)
    return common.shrink(config) if arg == "tiny" else config
