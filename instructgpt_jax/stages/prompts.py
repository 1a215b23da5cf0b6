"""Raw prompts to the prompt sets of a run (section 3.2, appendices A and C) by the functions of `data/prompts.py`.

Writes `train.jsonl.gz`, `valid.jsonl.gz` and `test.jsonl.gz` into the workdir, for later stages to read as
`jsonl:{workdir}/prompts/train.jsonl.gz`; with `config.prompts.few_shot` also `few_shot.jsonl.gz`, demonstrations that
few-shot instructions give; and in the end `report.json`: what each step dropped, and the paper's tables 6 and 8 to 11.
"""

import json

import jax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import process
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import datasets, prompt_tables, prompts, sources
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.evaluation import earlier

FEW_SHOT, REPORT = "few_shot.jsonl.gz", earlier.PROMPT_SETS


def run(config: ConfigDict, mesh: Mesh, workdir: str) -> None:
    """Reads the prompts of `config.data.prompts` and writes the sets; files alone, on the first process.

    Raises:
      ValueError: a malformed record, more of them than `config.data.skip_bad` lets be.
    """
    folder = epath.Path(workdir)
    workdirs.claim(workdirs.resolved(config, {}), folder)
    if (folder / REPORT).exists():
        process.say(f"prompts: complete in {folder}, nothing to do")
        return
    if jax.process_index() == 0:
        _write(config, folder)
    if jax.process_count() > 1:  # what the next stage reads is there
        multihost_utils.sync_global_devices("prompts")


def _write(config: ConfigDict, folder: epath.Path) -> None:
    c, tokenizer = config.prompts, tokenizers.load(config.data.tokenizer)

    def count_tokens(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer.encode(texts)]

    prepared = prompts.prepare(
        datasets.read(config.data, "prompts"),
        prefix_chars=c.prefix_chars,
        max_per_user=c.max_per_user,
        split=prompts.Split(c.split_key, c.valid_share, c.test_share),
        max_tokens=c.max_tokens,
        count_tokens=count_tokens,
        language_sample=c.language_sample,
    )
    given = tuple(c.few_shot)
    instructions = sources.load(given, "few_shot", config.data.skip_bad, config.data.data_dir) if given else []
    made = [one for record in instructions for one in prompts.few_shot(record, c.example, c.shots, c.shot_sets)]
    demonstrations = prompts.drop_long(made, c.max_tokens, count_tokens)
    splits = {name: getattr(prepared, name) for name in prompts.SPLITS}
    report = prepared.report | {
        "few_shot": {"instructions": len(instructions), "made": len(made), "left": len(demonstrations)},
        "tables": prompt_tables.tables(splits, demonstrations, count_tokens),
    }
    prompts.write_splits(prepared, folder)
    if c.few_shot:
        prompts.write_whole(folder / FEW_SHOT, demonstrations)
    workdirs.write_atomically(folder / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    for step in report["steps"]:
        process.say(f"prompts: {step['dropped']} dropped, {step['step']}; {step['left']} left")
    if made:
        process.say(f"prompts: {len(made)} demonstrations of {len(instructions)} few-shot instructions, "
                    f"{len(made) - len(demonstrations)} longer than {c.max_tokens} tokens left out")  # fmt: skip
    told = ", ".join(f"{count} {name}" for name, count in report["splits"].items())
    process.say(f"prompts: {told}, in {folder}")
