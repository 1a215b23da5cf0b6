"""InstructGPT from a language model of yours and public preference data: the whole method, one command.

Paper:    the three steps of figure 2 on real people's demonstrations and rankings, for a base of any family and size.
Command:  python -m instructgpt_jax.main --config=configs/instruct.py --config.base=DIRECTORY_OR_HUB_ID \
              --config.demonstrations=jsonl:DEMONSTRATIONS --config.comparisons=jsonl:COMPARISONS \
              --config.prompts=jsonl:PROMPTS --config.text=jsonl:TEXT
          docs/instruct.md says where public sets are. Several sources: --config.comparisons="'jsonl:A','jsonl:B'".
          `:gpu` is sized for a base of 135M and minutes of one GPU, `:cpu` for such a base on two cores; `:tiny` runs
          every stage for a few updates on the simulated world. `:one_chip` trains adapters (docs/adapters.md) on frozen
          bases, for one chip of 16 GB and a base of up to about 1B; its learning rates are ten times the others', by
          rule of thumb. Its stages were run at the sizes of `:cpu`.
          One stage alone: --config.only=reward.
          A base without a chat template of its own: --config.template=human_assistant.
          The paper's public benchmarks too (docs/benchmarks.md): --config.benchmark_data=DIRECTORY.
Hardware: one GPU of 80 GB or eight TPU v5e for a base of about 1B.
Writes:   a workdir for each stage, report/, and two exports in Hugging Face format, under runs/instruct/.

A tenth of the prompts is held out of every stage. The reward model of PPO and the judge learn from halves of the
comparisons that share no prompt. Residual dropout is 0, for published models were trained without it: at the paper's
0.2 the first SFT loss of SmolLM2-135M is 9.1 instead of 3.4.
"""

from typing import NamedTuple

from configs import common, measured

HELD_OUT = 0.1  # of the prompts


class Size(NamedTuple):
    """What a machine has time and memory for; see `SIZES`."""

    row_length: int  # tokens of a row of demonstrations, comparisons and pretraining text
    microbatch_rows: int
    prompt: int  # tokens, the longest that PPO and the evaluation take
    response: int  # tokens
    dtype: str
    batch_size: int  # demonstrations of an update
    sft_epochs: int
    fine_tuning_steps: int  # of either, the data repeating; 0 = by epochs
    comparisons: int  # prompts of an update of the reward model
    reward_steps: int  # the data repeating; 0 = one epoch
    head: int  # comparisons of the regression that the head starts from; 0 = it starts at random
    bias: int  # demonstrations that get mean score 0
    scored: int  # one of so many held-out comparisons is scored in the end
    episodes: int  # of an iteration of PPO, in 4 minibatches
    iterations: int
    wave: int
    ptx_ratio: int  # pretraining sequences an episode
    prompts: int  # in the evaluation; 0 = all that are held out
    documents: int  # of a public benchmark; 0 = all


SIZES = {
    "": Size(1024, 8, 512, 256, "bfloat16", 32, 3, 0, 64, 0, 0, 2048, 1, 512, 100, 256, 2, 0, 0),
    "one_chip": Size(1024, 2, 512, 256, "bfloat16", 32, 3, 0, 64, 0, 0, 2048, 1, 128, 100, 16, 2, 0, 0),
    "gpu": Size(1024, 16, 256, 128, "bfloat16", 32, 2, 0, 64, 0, 0, 2048, 1, 256, 30, 256, 1, 0, 200),
    "cpu": Size(512, 4, 128, 48, "float32", 16, 1, 40, 8, 12, 128, 128, 2, 32, 6, 32, 1, 48, 20),
    "tiny": Size(512, 8, 96, 32, "float32", 8, 1, 8, 8, 8, 0, 128, 1, 32, 4, 0, 1, 16, 4),
}
TINY = {  # of `:tiny`
    "sft.row_length": 256,
    "reward.max_completions": 9,
    "evaluate.pretraining.num_sequences": 16,
    "evaluate_reward.batch_size": 32,
}
GIVEN = ("demonstrations", "comparisons", "prompts", "text")  # the data that the user brings


def get_config(arg=""):
    size = SIZES[arg]
    stages = {}
    if arg == "tiny":
        stages["pretrain"] = base()
    stages["sft"] = fine_tuning(size, "{base}", size.sft_epochs, pretraining_fraction=0.0)
    stages["rlhf_init"] = fine_tuning(size, "{base}", num_epochs=2, pretraining_fraction=0.1)
    stages["reward"] = ranking(size, part=1)
    stages["judge"] = ranking(size, part=2)
    stages["judge"].seed = 1000
    stages["ppo"] = policy(size, ptx_coef=0.0)
    stages["ppo_ptx"] = policy(size, ptx_coef=27.8)
    stages["rewards"] = rewards(size)
    stages["evaluate"] = evaluation(size, tuple(stages)[:-1])
    stages["benchmark"] = benchmark(size)
    stages["export"] = export("ppo_ptx")
    stages["export_reward"] = export("reward")
    for stage in stages.values():
        sources(stage)
        if arg == "one_chip":
            on_adapters(stage)
        if arg == "tiny" and stage.stage != "export":
            common.shrink(stage, TINY)
    texts = {"base": "{workdir}/pretrain" if arg == "tiny" else "", "template": "chat", "benchmark_data": ""}
    config = common.pipeline(stages, GIVEN, texts, only_with={"benchmark": "benchmark_data"})
    if arg == "cpu":
        config.parallel = 1  # two stages of such a base beside each other want 18 GB and are no faster
    if arg == "tiny":
        config.template = "human_assistant"
        for kind, name in zip(GIVEN, ("demonstrations", "comparisons", "prompts", "pretraining"), strict=True):
            config[kind] = (f"simulated:{name}:train",)
    return config


def base():
    """`:tiny` has no base of its own: one of 170 thousand parameters, for as long as the other stages."""
    config = common.config("pretrain")
    config.data.tokenizer = "train:512"
    config.models.model = common.network("tiny", max_length=1024)  # what fits is scored, rows are shorter
    config.pretrain = common.pretraining(1e-3, batch_size=8, num_steps=8, row_length=128)
    return config


def fine_tuning(size, start, num_epochs, pretraining_fraction):
    """Step 1, and with pretraining text the policy that PPO starts from (appendix C.3)."""
    config = common.config("sft")
    config.models.model = common.network(init_from=start, dtype=size.dtype)
    config.sft = common.fine_tuning(1e-5, size.batch_size, num_epochs, pretraining_fraction)
    config.sft.update({"row_length": size.row_length, "microbatch_rows": size.microbatch_rows})
    if size.fine_tuning_steps:
        config.sft.update({"num_epochs": 0, "num_steps": size.fine_tuning_steps})
        config.checkpoint.every = max(1, size.fine_tuning_steps // 4)
    return config


def ranking(size, part):
    """Step 2 on one half of the comparisons, pairs and K-wise rankings alike."""
    config = common.config("reward")
    config.models.model = common.network(init_from="{workdir}/sft", dtype=size.dtype)
    config.reward = common.rankings(lr=1e-5, batch_size=size.comparisons)
    config.reward.update({"row_length": size.row_length, "microbatch_rows": size.microbatch_rows})
    config.reward.update({"head_examples": size.head, "bias_examples": size.bias})
    if size.reward_steps:
        config.reward.update({"num_epochs": 0, "num_steps": size.reward_steps})
        config.checkpoint.every = max(1, size.reward_steps // 4)
    config.data.comparisons = (f"{{comparisons}}#{part}/2",)
    return config


def policy(size, ptx_coef):
    """Step 3, PPO or PPO-ptx."""
    config = common.ppo(policy_lr=5e-6, value_lr=1e-5, ptx_coef=ptx_coef)
    config.models.policy = common.network(init_from="{workdir}/rlhf_init", dtype=size.dtype)
    config.models.reward = common.network(init_from="{workdir}/reward", dtype=size.dtype)
    config.rollout.wave = size.wave
    config.eval_every = config.snapshot_every = max(1, size.iterations // 4)
    config.checkpoint.every = max(1, size.iterations // 10)
    config.ppo.update(
        {
            "iterations": size.iterations,
            "batch_size": size.episodes,
            "num_minibatches": 4,
            "max_prompt_length": size.prompt,
            "response_length": size.response,
            "row_length": size.prompt + size.response,
            "microbatch_rows": size.microbatch_rows,
            "kl_coef": 0.05,
            "ema_decay": 0.95,  # the run is short
            "ptx_ratio": size.ptx_ratio,
            "ptx_row_length": size.row_length // 4,
            "ptx_microbatch_rows": size.microbatch_rows,
        }
    )
    config.ppo.policy_optimizer.warmup_steps = min(20, size.iterations)
    config.data.max_prompt_tokens = size.prompt
    return config


def on_adapters(config):
    """What trains is an adapter on every projection, in bfloat16 around a frozen base; activations are recomputed."""
    sections = {"sft": ("optimizer",), "reward": ("optimizer",), "ppo": ("policy_optimizer", "value_optimizer")}
    for name in {"sft": ("model",), "reward": ("model",), "ppo": ("policy", "value")}.get(config.stage, ()):
        config.models[name].adapter.update({"targets": ("all",)})
    for name in sections.get(config.stage, ()):
        config[config.stage][name].lr *= 10
    if config.stage in sections:
        for entry in config.models.values():
            entry.update({"dtype": "bfloat16", "remat": "full"})


def rewards(size):
    """Both reward models on the comparisons that neither has seen, source by source."""
    config = measured.reward_evaluation()
    for name in ("reward", "judge"):
        config.models[name] = common.network(init_from=f"{{workdir}}/{name}", dtype=size.dtype)
    config.evaluate_reward.update(
        {
            "comparisons": (f"{{comparisons}}#1/{size.scored}" if size.scored > 1 else "{comparisons}",),
            "bag_of_words": ("{comparisons}",),
            "split": "valid",
            "batch_size": 32,
            "row_length": size.row_length,
            "microbatch_rows": size.microbatch_rows,
        }
    )
    return config


def evaluation(size, trained):
    """The policies on prompts that no stage has seen."""
    frozen = {"reward": "reward", "judge": "judge", "ref_policy": "rlhf_init"}
    policies = measured.policies("base", "")
    config = measured.evaluation("InstructGPT from public preference data", frozen, policies)
    for entry in config.models.values():
        entry.dtype = size.dtype
    config.models.base.init_from = "{base}"
    config.data.max_prompt_tokens = size.prompt
    config.evaluate.update(
        {
            "distributions": {"prompts": ("{prompts}",)},
            "num_prompts": size.prompts,
            "split": "valid",
            "max_prompt_length": size.prompt,
            "response_length": size.response,
            "row_length": size.prompt + size.response,
            "microbatch_rows": size.microbatch_rows,
            "pretraining": {"num_sequences": 64, "row_length": size.row_length // 4},
            "overoptimisation": {
                "runs": {"ppo": "{workdir}/ppo", "ppo_ptx": "{workdir}/ppo_ptx"},
                "prompts": ("{prompts}",),
            },
            "curves": {name: "{workdir}/" + name for name in trained},
        }
    )
    return config


def benchmark(size):
    """The policies on the paper's public tasks, as texts without a template: what they know, and what they say."""
    config = measured.benchmark("The paper's benchmarks", measured.policies("base", ""))
    for entry in config.models.values():
        entry.dtype = size.dtype
    config.models.base.init_from = "{base}"
    config.benchmark.update(
        {
            "data_dir": "{benchmark_data}",
            "limit": size.documents,
            "batch_size": 8 * size.microbatch_rows,
            "microbatch_rows": size.microbatch_rows,
        }
    )
    return config


def export(stage):
    """A trained network for transformers."""
    config = common.config("export")
    config.models.model = common.network(init_from=f"{{workdir}}/{stage}")
    config.export = common.export()
    return config


def sources(config):
    """Where the records of a stage come from, and how dialogues are written."""
    config.data.demonstrations = ("{demonstrations}",)
    config.data.comparisons = config.data.comparisons or ("{comparisons}",)
    config.data.prompts = ("{prompts}",)
    config.data.pretraining = ("{text}",)
    config.data.valid_fraction = HELD_OUT
    config.data.skip_long = True  # public sets have dialogues of any length
    config.data.template = "{template}"
