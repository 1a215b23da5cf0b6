"""The FLAN baseline of 175B parameters: GPT-3 fine-tuned on public tasks that are worded as instructions.

Paper:    section 3.5 and appendix C.5: 1.2 million examples of FLAN, none repeated, batch 64, lr 4e-6 (6e-6 was tried),
          cosine to 10 %. The snapshot is chosen afterwards by the 6B reward model's score of its answers to validation
          prompts; it was that after 896,000 examples. Here one is left every 128,000, with which 896,000 and the points
          of figure 13 agree. The paper says nothing of dropout (here: none) or of loss on the prompt (here: none).
Data:     python -m instructgpt_jax.data.instruction --input 'flan/*.jsonl.gz' --cap=30000 --rate=3000 \
              --total=1200000 --out=flan.jsonl.gz
Command:  python -m instructgpt_jax.main --config=configs/flan_175b.py \
              --config.models.model.init_from=DIR --config.data.demonstrations=jsonl:flan.jsonl.gz
          python -m instructgpt_jax.main --config=configs/select.py --config.models.model.init_from=runs/flan_175b \
              --config.data.prompts=jsonl:FILES --workdir=runs/flan_175b_selected
Model:    no public one has this shape: init_from=DIR is a checkpoint of yours; without it the weights are fresh.
Hardware: 2.8 TB of parameters, gradients and moments: 64 TPU v5p (fsdp 8 x tensor 8) or 64 GPUs of 80 GB.
Expected: 18,562 updates on 1.2 million examples, a hundredth of them held out. The reward model's score saturates after
          about 400,000. The result is preferred to the SFT baseline in 29.8 +- 2 % of the cases, PPO-ptx to the result
          in 78 +- 4 % (section 4.1).
"""

from configs import common


def baseline(lr):
    """What is the same at every size."""
    config = common.config("sft")
    config.data.update({"valid_fraction": 0.01, "skip_long": True})  # a million texts of any length
    config.eval_every = config.snapshot_every = 2000  # 128,000 examples
    config.sft = common.fine_tuning(lr, batch_size=64, num_epochs=1, pretraining_fraction=0.0)
    return config


def get_config(arg=""):
    config = baseline(lr=4e-6)
    config.mesh.update({"data": 1, "fsdp": 8, "tensor": -1})  # 64 short examples fill few rows
    config.data.tokenizer = "openai-community/gpt2"
    config.models.model = common.network("gpt3-175b", dtype="bfloat16", remat="full")
    return common.shrink(config) if arg == "tiny" else config
