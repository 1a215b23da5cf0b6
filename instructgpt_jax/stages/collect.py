"""Comparisons for the reward model: completions of the present policies, ranked by labelers (Ouyang et al. 2022, 3.4).

Each prompt of `config.data.prompts` gets K = 4 to 9 completions, in turn from every policy of `config.models`. One
simulated labeler of each group in `config.collect.labelers` ranks them all; without groups they are written out for
people to rank (stage `label`). A completion keeps whether it `ended` and the `tokens` that were sampled, so that the
reward model reads what PPO will score: an answer that was cut has no end token, and another segmentation of the text is
another input. A later stage reads the file of the workdir, `jsonl:{workdir}/collect/comparisons.jsonl`.
"""

import json
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import networks, process, responses, simulated
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import chats, datasets, encoding, padding
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.simulated import world
from instructgpt_jax.training import resume

RANKED, SHUFFLED, UNRANKED = "comparisons.jsonl", "shuffled.jsonl", "unranked.jsonl"
TOLD = 5  # lines of progress a policy
KEPT = ("prompt", "user", "use_case")  # fields of a prompt that its comparisons carry


def run(config: ConfigDict, mesh: Mesh, workdir: str) -> None:
    """Writes `comparisons.jsonl` into the workdir, with `config.collect.shuffled` also `shuffled.jsonl`: the same
    completions with their ranks in random order; without labelers `unranked.jsonl` instead, with `policies`: who wrote
    which.

    Raises:
      ValueError: a policy that is missing, or whose context does not hold a prompt with its response.
    """
    c, folder = config.collect, epath.Path(workdir)
    tokenizer = tokenizers.load(config.data.tokenizer)
    policies = {
        name: networks.build(f"config.models.{name}", config.models[name], "lm", mesh, tokenizer, config.seed)
        for name in sorted(config.models)
    }
    nets = (policy.config for policy in policies.values())
    networks.check_context("prompt and response of config.collect", c.max_prompt_length + c.response_length, *nets)
    workdirs.claim(workdirs.resolved(config, {name: policy.entry for name, policy in policies.items()}), folder)
    last = folder / (RANKED if c.labelers else UNRANKED)
    if last.exists():
        process.say(f"collect: complete in {folder}, nothing to do")
        return

    records = datasets.read(config.data, "prompts")
    allowed = datasets.allowed(config.data)
    prompts = encoding.prompts(records, tokenizer, allowed, max_prompt_length=c.max_prompt_length)
    resume.tell_data(datasets.described([{"prompts": prompts}]), folder)
    chosen = choose(len(prompts.examples), c.num_prompts, config.seed)
    wanted = {name: [] for name in policies}  # (prompt, completion) by the policy that writes it
    for number in chosen:
        for k in range(count_completions(number, *c.completions, config.seed)):
            wanted[sorted(policies)[(number + k) % len(policies)]].append((number, k))

    written = {}  # (prompt, completion) -> its Response
    for name, policy in policies.items():
        process.end_if_stopped()
        sampler = responses.sampler_of(policy.config, tokenizer, c, config.seed)
        written |= complete(c, sampler, networks.freeze(policy), prompts.examples, wanted[name], mesh, name)

    collected = []
    for number in chosen:
        record = records[int(prompts.records[number])]
        count = count_completions(number, *c.completions, config.seed)
        found = [written[number, k] for k in range(count)]
        kept = {field: record[field] for field in KEPT if field in record}
        if "messages" in record:
            kept["messages"] = chats.prompt_of(record)
        if not c.labelers:  # people will be asked: the key of their questionnaire keeps who wrote what
            kept["policies"] = [sorted(policies)[(number + k) % len(policies)] for k in range(count)]
        kept |= {
            "completions": [one.text for one in found],
            "ended": [one.ended for one in found],
            "tokens": [one.tokens[: len(one.tokens) - one.ended].tolist() for one in found],  # without what ends them
            "tokenizer": tokenizer.hash,
        }
        collected.append(kept)
    if jax.process_index() > 0:
        return
    ranked = [line for record in collected for line in rank(record, c.labelers, config.seed)]
    if c.shuffled:
        _write(folder / SHUFFLED, [shuffle(line, config.seed) for line in ranked])
    _write(last, ranked or collected)  # last: it says that the stage is complete
    process.say(f"collect: {len(ranked or collected)} comparisons of {len(collected)} prompts in {last}")


def choose(count: int, wanted: int, seed: int) -> list[int]:
    """`wanted` of `count` prompts in their order, drawn by the seed; all of them where it is 0 or too many."""
    order = np.random.default_rng(seed).permutation(count)
    return sorted(order[: wanted or count].tolist())


def count_completions(number: int, low: int, high: int, seed: int) -> int:
    """K of a prompt, uniform in [low, high]."""
    return low + int(world.rng_of("completions", seed, number).random() * (high + 1 - low))


def complete(
    c: ConfigDict,
    sampler: responses.Sampler,
    params: dict,
    prompts: list[np.ndarray],
    items: list[tuple[int, int]],
    mesh: Mesh,
    name: str,
) -> Iterator[tuple[tuple[int, int], responses.Response]]:
    """Each item with what one policy writes.

    Args:
      c: config.collect.
      prompts: (length,) int32 arrays.
      items: (prompt, completion) that it writes.
      name: of the policy, for people.
    """
    asked = [prompts[number] for number, _ in items]
    index = [number * c.completions[1] + k for number, k in items]
    batches = padding.by_width([len(ids) for ids in asked], c.max_prompt_length, c.batch_size, c.batch_size)
    done, told = 0, 0
    for batch, found in responses.answer(sampler, params, asked, index, batches, mesh):
        process.end_if_stopped()
        yield from zip((items[place] for place in batch.places), found, strict=True)
        done += len(found)
        if done - told >= len(items) / TOLD or done == len(items):
            told = done
            process.say(f"collect {done}/{len(items)} completions by {name}")


def rank(record: dict, groups: tuple[str, ...], seed: int) -> Iterator[dict]:
    """The record as a comparison, once for each group of labelers: by one of them, who depends on the prompt."""
    prompt = chats.named(record)
    for group in groups:
        (labeler,) = simulated.draw_labelers(group, prompt, 1, seed)
        ranking = simulated.rank(labeler, prompt, record["completions"], seed)
        yield record | {"ranking": ranking, "labeler": labeler.name, "group": group}


def shuffle(record: dict, seed: int) -> dict:
    """The comparison with its ranks in an order that has nothing to do with the completions."""
    ranks = record["ranking"]
    rng = world.rng_of("shuffle", record["labeler"], chats.named(record), seed)
    return record | {"ranking": world.sample(rng, ranks, len(ranks))}


def _write(path: epath.Path, records: list[dict]) -> None:
    workdirs.write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
