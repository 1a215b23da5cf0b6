"""Questionnaires that people answer in Label Studio, and their answers as records (docs/labeling.md).

Paper:    sections 3.2-3.4, appendices A.1 and B: demonstrations, prompts, ratings and rankings by about 40 labelers.
Command:  python -m instructgpt_jax.main --config=configs/label.py:comparisons --workdir=runs/ranked \
              --config.label.source=jsonl:runs/collect/unranked.jsonl --config.label.labelers=labelers.jsonl
          then the same with --config.label.step=push, pull or read. Behind the colon stands the kind: comparisons
          (without one), demonstrations, plain_prompts, few_shot_prompts, user_prompts, toxicity, sensitive or grades.
Starts:   from any records: `collect` without labelers writes what is to be ranked.
Hardware: none; Label Studio runs on a laptop, in an environment of its own.
Expected: projects/*/tasks.json, config.xml and instructions.md; then comparisons.jsonl and ratings.jsonl, or the files
          of the kind. In the paper training labelers agree on 72.6 % of the pairs that they rank.
"""

from configs import common


def get_config(arg=""):
    kind = "comparisons" if arg in ("", "tiny") else arg
    config = common.labeling(kind)
    if arg == "tiny":
        config.label.update({"source": ("simulated:comparisons:20",), "num_tasks": 4, "labelers": "labelers.jsonl"})
    return config
