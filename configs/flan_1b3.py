"""The FLAN baseline of 1.3B parameters: ours, for the paper has it at 175B alone.

Paper:    configs/flan_175b.py has its numbers, for section 3.5 and appendix C.5. Here they are the same but for the
          learning rate: 4e-6 times 9.65e-6 / 5.03e-6, which is what the paper's SFT has at this size over what it has
          at 175B (appendix C.1).
Data:     as for configs/flan_175b.py.
Command:  python -m instructgpt_jax.main --config=configs/flan_1b3.py \
              --config.data.demonstrations=jsonl:flan.jsonl.gz
          python -m instructgpt_jax.main --config=configs/select.py --config.models.model.init_from=runs/flan_1b3 \
              --config.data.prompts=jsonl:FILES --workdir=runs/flan_1b3_selected
Model:    GPT-Neo 1.3B stands in for GPT-3 XL, which is not public.
Hardware: 21 GB of parameters, gradients and moments: one 80 GB GPU, or a slice of 8 TPU v5e.
Expected: 18,562 updates on 1.2 million examples, a hundredth of them held out; it has not
          been run.
"""

from configs import common, flan_175b


def get_config(arg=""):
    config = flan_175b.baseline(lr=7.67e-6)
    config.models.model = common.network(init_from="EleutherAI/gpt-neo-1.3B", dtype="bfloat16", remat="full")
    return common.shrink(config) if arg == "tiny" else config
