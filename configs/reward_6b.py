"""The reward model of 6B parameters, one for all policies.

Paper:    section 3.5 (eq. 1) and appendix C.2: one epoch, lr 9e-6, cosine to 10 %, batches of 64 prompts, all pairs
          of a prompt one batch element; afterwards a bias that gives demonstrations mean score 0. The paper's started
          from GPT-3 tuned on public NLP data "for historical reasons" and found GPT-3 and the SFT model as good; this
          one starts from the SFT model.
Command:  python -m instructgpt_jax.main --config=configs/reward_6b.py --config.data.comparisons=jsonl:FILES \
              --config.data.demonstrations=jsonl:FILES
          How it generalises to labelers unseen in training: --config.reward.folds=5 --config.reward.fold_by=labeler
          --config.reward.fold_seeds=3 --workdir=runs/reward_6b_folds (fifteen models, section 4.1).
Starts:   from runs/sft_6b (configs/sft_6b.py).
Hardware: 107 GB of parameters, gradients and moments: 4 GPUs of 80 GB, or 4 TPU v5p.
Expected: about 519 updates on the paper's 33,207 prompts. The paper: 72.4 % of pairs right on labelers seen in
          training, 69.6 % on others: the first is reward/valid_accuracy, folds measure both.
"""

from configs import common


def get_config(arg=""):
    config = common.config("reward")
    config.models.model = common.network(init_from="runs/sft_6b", dtype="bfloat16", remat="full")
    config.reward = common.rankings(lr=9e-6, batch_size=64)
    return common.shrink(config) if arg == "tiny" else config
