"""Raw prompts to the prompt sets of a run: repeats, heavy users, personal information and long prompts go.

Paper:    section 3.2, appendices A.1 to A.3 and C, tables 6 and 8 to 11.
Command:  python -m instructgpt_jax.main --config=configs/prompts.py --workdir=runs/prompts \
              --config.data.prompts=jsonl:raw/*.jsonl
          Few-shot instructions with their pairs too: --config.prompts.few_shot=jsonl:few_shot.jsonl, several sets of
          shots for each pair: --config.prompts.shots=3 --config.prompts.shot_sets=4.
Starts:   from records with `prompt` and `user`.
Hardware: none; a million prompts take minutes of one core.
Writes:   train.jsonl.gz, valid.jsonl.gz, test.jsonl.gz, few_shot.jsonl.gz and report.json.
Expected: in the paper 31,144, 16,185 and 3,196 prompts of customers (table 6), of 166, 186 and 115 tokens (table 9).
"""

from configs import common


def get_config(arg=""):
    config = common.prompt_sets()
    config.data.tokenizer = "gpt2"  # GPT-3 has the same
    if arg == "tiny":
        config.data.update({"prompts": ("simulated:prompts:600",), "pretraining": ("simulated:pretraining:200",)})
        config.data.tokenizer = "train:512"
        config.prompts.update({"few_shot": ("simulated:few_shot:20",), "example": "Input: {query}\nAnswer: {response}"})
        config.prompts.update({"shots": 1, "shot_sets": 2, "max_tokens": 72})
    return config
