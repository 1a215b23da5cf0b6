"""How often reward models agree with people, on any comparisons.

Paper:    section 4.1 (72.4 % on the training labelers' comparisons, 69.6 % on those of held-out ones).
Command:  python -m instructgpt_jax.main --config=configs/evaluate_reward.py \
              --config.models.reward.init_from=runs/reward_6b \
              --config.evaluate_reward.comparisons=jsonl:FILES
          `--config=configs/evaluate_reward.py:ours,theirs` compares two, --config.models.ours.init_from
          and --config.models.theirs.init_from: workdirs, or Hugging Face classifiers with one label, by directory or
          Hub id.
Hardware: the reward models one after another, in bfloat16, without optimiser: one 80 GB GPU for 6B.
Writes:   rewards.json (accuracy by source and by number of completions with 95 % intervals, ties, calibration, length
          bias, the quality of the best of n) and scores.jsonl (every comparison with its scores).
Expected: 0.5 is chance. "longer" is what the length alone gives; --config.evaluate_reward.bag_of_words=jsonl:TRAIN
          adds what a linear model of words gives.
"""

from configs import common, measured


def get_config(arg=""):
    tiny = arg == "tiny"
    names = ("reward",) if tiny or not arg else tuple(arg.split(","))
    config = measured.reward_evaluation()
    for name in names:
        config.models[name] = common.network(init_from="runs/reward_6b" if name == "reward" else "", dtype="bfloat16")
    if tiny:
        common.shrink(config)
        config.evaluate_reward.comparisons = config.data.comparisons
    return config
