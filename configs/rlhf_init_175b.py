"""The policy of 175B parameters that starts RLHF: not the SFT baseline.

Paper:    appendix C.3: 2 epochs on the demonstrations with 10 % pretraining data, lr 2.45e-6, batch 8, cosine to 10 %.
          It is also the KL reference. The paper does not say what the 10 % are of (here: of the loss, see
          instructgpt_jax/stages/sft.py), nor the dropout (here: none).
Command:  python -m instructgpt_jax.main --config=configs/rlhf_init_175b.py \
              --config.models.model.init_from=DIR --config.data.demonstrations=jsonl:FILES \
              --config.data.pretraining=jsonl:FILES
Model:    no public one has this shape: init_from=DIR is a checkpoint of yours; without it the weights are fresh.
Hardware: 2.8 TB of parameters, gradients and moments: 64 TPU v5p (fsdp 8 x tensor 8) or 64 GPUs of 80 GB.
Expected: about 3,640 updates on the paper's 12,725 demonstrations. Appendix E.8: 10 % is slightly better than 0 or 50
          %, and PPO is not sensitive to it.
"""

from configs import common


def get_config(arg=""):
    config = common.config("sft")
    config.mesh.update({"data": 1, "fsdp": 8, "tensor": -1})  # 8 examples: no more batch shards than that
    config.data.tokenizer = "openai-community/gpt2"
    config.models.model = common.network("gpt3-175b", dtype="bfloat16", remat="full")
    config.sft = common.fine_tuning(lr=2.45e-6, batch_size=8, num_epochs=2, pretraining_fraction=0.1)
    return common.shrink(config) if arg == "tiny" else config
