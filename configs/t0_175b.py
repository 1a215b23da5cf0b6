"""The T0 baseline of 175B parameters: GPT-3 fine-tuned on public tasks in the templates of P3.

Paper:    section 3.5 and appendix C.5: T0++, 96 million examples, subsampled to 1 million, none repeated within an
          epoch; cosine to 10 %. Two runs: batch 128, lr 4e-6, 1.28 million examples; and `:second`: batch 64, lr 6e-6,
          1 million examples. The snapshot is chosen afterwards by the 6B reward model's score of its answers to
          validation prompts; it was that of the first run after 896,000 examples. Here one is left every 128,000, with
          which 896,000 agrees. The paper says nothing of dropout (here: none) or of loss on the prompt (here: none).
Data:     python -m instructgpt_jax.data.instruction --input 'p3/*.jsonl.gz' --cap=500000 --total=1000000 \
              --out=t0.jsonl.gz
Command:  python -m instructgpt_jax.main --config=configs/t0_175b.py \
              --config.models.model.init_from=DIR --config.data.demonstrations=jsonl:t0.jsonl.gz
          python -m instructgpt_jax.main --config=configs/select.py --config.models.model.init_from=runs/t0_175b \
              --config.data.prompts=jsonl:FILES --workdir=runs/t0_175b_selected
Model:    no public one has this shape: init_from=DIR is a checkpoint of yours; without it the weights are fresh.
Hardware: 2.8 TB of parameters, gradients and moments: 64 TPU v5p (fsdp 8 x tensor 8) or 64 GPUs of 80 GB.
Expected: 10,000 updates, 1.3 times through a million examples, a hundredth of them held out; fewer than
          650,000 are refused. The result is preferred to the SFT baseline in 26.8 +- 2 % of the cases, PPO-ptx to the
          result in 79 +- 4 % (section 4.1).
"""

from configs import common


def baseline(lr, batch_size, num_steps):
    """What is the same at every size."""
    config = common.config("sft")
    config.data.update({"valid_fraction": 0.01, "skip_long": True})  # a million texts of any length
    config.eval_every = config.snapshot_every = 128_000 // batch_size  # updates
    config.sft = common.fine_tuning(lr, batch_size, num_epochs=2, pretraining_fraction=0.0)
    config.sft.num_steps = num_steps
    return config


def get_config(arg=""):
    config = baseline(6e-6, 64, 15_625) if arg == "second" else baseline(4e-6, 128, 10_000)
    config.mesh.update({"data": 1, "fsdp": 8, "tensor": -1})  # 64 short examples fill few rows
    config.data.tokenizer = "openai-community/gpt2"
    config.models.model = common.network("gpt3-175b", dtype="bfloat16", remat="full")
    return common.shrink(config) if arg == "tiny" else config
