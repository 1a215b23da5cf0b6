"""The T0 baseline of 6B parameters: ours, for the paper has it at 175B alone.

Paper:    configs/t0_175b.py has its numbers, for section 3.5 and appendix C.5. Here they are the same but for the
          learning rate: 4e-6 times 9.65e-6 / 5.03e-6, which is what the paper's SFT has at this size over what it has
          at 175B (appendix C.1).
Data:     as for configs/t0_175b.py.
Command:  python -m instructgpt_jax.main --config=configs/t0_6b.py \
              --config.data.demonstrations=jsonl:t0.jsonl.gz
          python -m instructgpt_jax.main --config=configs/select.py --config.models.model.init_from=runs/t0_6b \
              --config.data.prompts=jsonl:FILES --workdir=runs/t0_6b_selected
Model:    GPT-J 6B stands in for GPT-3 6.7B, which is not public.
Hardware: 107 GB of parameters, gradients and moments: 4 GPUs of 80 GB, or 4 TPU v5p.
Expected: 10,000 updates, 1.3 times through a million examples; it has not been run.
"""

from configs import common, t0_175b


def get_config(arg=""):
    config = t0_175b.baseline(lr=7.67e-6, batch_size=128, num_steps=10_000)
    config.models.model = common.network(init_from="EleutherAI/gpt-j-6b", dtype="bfloat16", remat="full")
    return common.shrink(config) if arg == "tiny" else config
