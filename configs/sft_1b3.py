"""The SFT baseline of 1.3B parameters.

Paper:    appendix C.1: 16 epochs, lr 9.65e-6, batch 32, cosine to 10 % without warm-up, residual dropout 0.2; the epoch is
          chosen afterwards by reward-model score (`stage=select`), so every epoch leaves a snapshot.
Command:  python -m instructgpt_jax.main --config=configs/sft_1b3.py --config.models.model.init_from=DIR
Hardware: one 80 GB GPU or a v5e-8 slice; about 6,360 updates on the paper's 12,725 demonstrations.
Expected: validation loss rises after the first epoch while the reward model's score goes on rising (section 3.5).
"""

from configs import common


def get_config(arg=""):
    config = common.config("sft")
    config.snapshot_every = -1
    config.data.demonstrations = ("simulated:demonstrations",)
    config.models.model = common.network("", init_from="EleutherAI/gpt-neo-1.3B", dtype="bfloat16", remat="full")
    config.models.model.residual_dropout = 0.2
    config.sft = dict(
        batch_size=32,
        num_epochs=16,
        num_steps=0,
        row_length=2048,
        microbatch_rows=8,
        loss_on_prompt=False,
        pretraining_fraction=0.0,
        optimizer=common.optimizer(9.65e-6, "cosine"),
    )
    if arg == "tiny":
        common.shrink(config)
    return config
