"""The paper's public benchmarks on policies side by side: truth, toxicity, bias, and the alignment tax.

Paper:    section 4.2, appendices D and E, figures 6, 7, 28, 29, 32 and table 14.
Command:  python -m instructgpt_jax.main --config=configs/benchmark.py --config.benchmark.data_dir=DIRECTORY
          docs/benchmarks.md says which tasks there are and where their data come from; without a directory, from the
          Hugging Face Hub. A few tasks: --config.benchmark.tasks="('instructgpt_hellaswag','rte')"; a first look:
          --config.benchmark.limit=20. Any two models: `configs/benchmark.py:gpt2,HuggingFaceTB/SmolLM2-135M`, each a
          workdir, a directory in Hugging Face format or a Hub id; `a=PATH,b=PATH` gives them names.
          Needs the extra `eval`. Graders of truth and toxicity are yours, see the same document.
Starts:   from GPT-Neo 1.3B, and runs/sft_1b3, ppo_1b3 and ppo_ptx_1b3.
Hardware: the networks in bfloat16, one after another: one GPU.
Expected: report/index.html. In the paper PPO costs accuracy on most tasks, and PPO-ptx less (figure 29).
"""

from configs import common, measured

POLICIES = [
    measured.Policy("", "base", "GPT", "base", "1.3B"),
    measured.Policy("sft_1b3", "sft", "SFT", "sft", "1.3B"),
    measured.Policy("ppo_1b3", "ppo", "PPO", "ppo", "1.3B"),
    measured.Policy("ppo_ptx_1b3", "ppo_ptx", "PPO-ptx", "ppo_ptx", "1.3B"),
]


def get_config(arg=""):
    given = [] if arg in ("", "tiny") else [one.rpartition("=") for one in arg.split(",")]
    names = [name or f"model{number}" for number, (name, _, _) in enumerate(given, 1)]
    own = [measured.Policy("", n, name or path, "base", "") for n, (name, _, path) in zip(names, given, strict=True)]
    config = measured.benchmark("The paper's benchmarks", own or POLICIES)
    for entry in config.models.values():
        entry.update({"init_from": entry.init_from.replace("{workdir}", "runs"), "dtype": "bfloat16"})
    if not own:
        config.models.base.init_from = "EleutherAI/gpt-neo-1.3B"
    for name, (_, _, path) in zip(names, given, strict=True):
        config.models[name].update({"init_from": path, "dtype": "float32"})
    if arg == "tiny":
        common.shrink(config)
        config.benchmark.update({"limit": 4, "row_length": 128, "batch_size": 8})
    return config
