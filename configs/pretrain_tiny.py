"""A base model of a million parameters from running text, on a laptop.

Paper:    GPT-3's recipe in small (Brown et al. 2020, appendix B): Adam 0.9 / 0.95, clip 1.0, weight decay 0.1, cosine
          to 10 %.
Command:  python -m instructgpt_jax.main --config=configs/pretrain_tiny.py
Hardware: two CPU cores, a few minutes. `:tiny` is a smoke test of seconds.
"""

from configs import common


def get_config(arg=""):
    config = common.config("pretrain")
    config.data.pretraining = ("simulated:pretraining",)
    config.data.tokenizer = "train:1024"
    config.models.model = common.network("tiny", num_layers=4, width=128, num_heads=4, mlp_width=512, max_length=256)
    config.pretrain = common.pretraining(1e-3, batch_size=32, num_steps=600, row_length=256)
    config.pretrain.optimizer.warmup_steps = 30
    config.eval_every = 200
    if arg == "tiny":
        config.data.pretraining = ("simulated:pretraining:2000",)
        config.models.model = common.network("tiny", max_length=512)
        common.shrink(config, {"pretrain.row_length": 128})
    return config
