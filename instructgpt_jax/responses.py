"""The one way to have prompts answered and texts scored, for every stage.

`answer` has prompts of the host answered, batch by batch; `answer_and_measure` has the validation prompts of a data set
answered, and other networks say what they think of it. `score` has a reward model read texts. A program is compiled
once for an architecture and a shape, whichever stage asks and whatever the weights. What it returns lies whole on every
device, so that every process of a job can read it.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import episodes as ep
from instructgpt_jax import reward, rollout
from instructgpt_jax.data import chats, encoding, padding
from instructgpt_jax.data.tokenizer import Tokenizer
from instructgpt_jax.episodes import Episodes, Packed
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.sharding import constrain
from instructgpt_jax.training import memory

SCALARS = {"score": "reward", "judge": "judge"}  # how the scalar of a network is called
MEASURES = (*SCALARS, "kl")  # in the order in which a line of samples has them
TURNS = 4  # a program answers so many batches: a slot that is free takes a prompt of the next


class Sampler(NamedTuple):
    """How a policy answers: all that a program is compiled for, see `rollout.generate`; wave 0 = as many as fit."""

    network: ModelConfig
    tokenizer: Tokenizer
    seed: int
    response_length: int
    temperature: float
    top_k: int
    top_p: float
    wave: int
    cache: str = "full"


class Answers(NamedTuple):
    """Sampled answers to a batch of prompts.

    episodes: the prompts and the responses.
    logprobs: (B, R) float32, see rollout.Rollout.
    index: (B,) int32 of the prompts, see `answer_batch`.
    """

    episodes: Episodes
    logprobs: jax.Array
    index: jax.Array


class Response(NamedTuple):
    """An answer as the host has it.

    text: without the token that ended it; with a chat template the content of a message.
    ended: whether the policy ended it; else it was cut.
    tokens: (length,) int32 that were sampled, the token that ended it included: what a reward model reads.
    logprobs: (length,) float32 of the tokens, see rollout.Rollout.
    """

    text: str
    ended: bool
    tokens: np.ndarray
    logprobs: np.ndarray


def sampler_of(
    network: ModelConfig, tokenizer: Tokenizer, options: ConfigDict, seed: int, wave: int = 0, cache: str = "full"
) -> Sampler:
    """The Sampler of a section of the configuration.

    Args:
      network: of the policy.
      options: `response_length` and `temperature`, and `top_k` and `top_p` but for PPO, which samples from all tokens.
      seed, wave, cache: see Sampler.
    """
    chosen = options.response_length, options.temperature, options.get("top_k", 0), options.get("top_p", 1.0)
    return Sampler(network.replace(remat="none"), tokenizer, seed, *chosen, wave, cache)  # remat is of backward passes


# Answers --------------------------------------------------------------------------------------------------------------


def answer(
    sampler: Sampler,
    params: dict,
    prompts: Sequence[np.ndarray],
    index: Sequence[int],
    batches: Iterable[padding.Batch],
    mesh: Mesh,
    iteration: int = 0,
) -> Iterator[tuple[padding.Batch, list[Response]]]:
    """Batches with the responses to their prompts, as they come.

    Up to TURNS batches of one shape are answered together, with as many slots as one has rows, and a prompt that stands
    in them several times is read once; the batch that comes back has the places of all.

    Args:
      params: of the policy.
      prompts: (length,) int32 each.
      index: of each prompt. It says, with seed and iteration, which random numbers are used, so that a response does
        not depend on what is sampled beside it.
      batches: places in `prompts`, and the shapes of the programs.
      iteration: another one, other responses.
    """
    for batch in padding.joined(batches, TURNS):
        same: dict[bytes, list[int]] = {}  # a prompt -> its places
        for place in batch.places:
            same.setdefault(prompts[place].tobytes(), []).append(place)
        places, rows = [place for some in same.values() for place in some], TURNS * batch.rows
        tokens, lengths = padding.pad([prompts[some[0]] for some in same.values()], rows, batch.width)
        counts = np.zeros(rows, np.int32)
        counts[: len(same)] = [len(some) for some in same.values()]
        numbers = padding.fill(np.array([index[place] for place in places], np.int32), rows)
        given = *padding.put((tokens, lengths, numbers), mesh), np.int32(iteration), padding.put(counts, mesh)
        found = jax.device_get(answer_batch(sampler._replace(wave=sampler.wave or batch.rows), params, *given))
        yield batch._replace(places=places), read(sampler.tokenizer, found, range(len(places)))


@functools.partial(jax.jit, static_argnums=0)
def answer_batch(
    sampler: Sampler,
    params: dict,
    prompts: jax.Array,
    lengths: jax.Array,
    index: jax.Array,
    iteration: jax.Array,
    counts: jax.Array | int = 1,
) -> Answers:
    """Samples B responses to (P, Q) prompts.

    Only ids that a token of the tokenizer has are sampled, and any of its end tokens ends a response.

    Args:
      params: of the policy, as trained or frozen.
      prompts, lengths: (P, Q) int32, right-padded with anything; (P,) int32.
      index: (B,) int32, the identity of each response for its random numbers.
      iteration: () int32.
      counts: (P,) int32, responses to each prompt, B at most; what is left over is empty. 1 = one to each, B is P.
    """
    tokens, logprobs, mask = rollout.generate(
        sampler.network,
        params,
        prompts,
        lengths,
        sampler.response_length,
        sampler.seed,
        sampler.temperature,
        top_k=sampler.top_k,
        top_p=sampler.top_p,
        eos_id=sampler.tokenizer.end_ids,
        iteration=iteration,
        episodes=index,
        wave=sampler.wave or None,
        allowed=sampler.tokenizer.allowed(sampler.network.vocab_size),
        answers=counts,
        cache=sampler.cache,
    )
    if not isinstance(counts, int):
        owners = jnp.repeat(jnp.arange(len(prompts)), counts, total_repeat_length=len(index))
        prompts, lengths = prompts[owners], lengths[owners]
    return _whole(Answers(Episodes(prompts, lengths, tokens, mask), logprobs, index))


def read(tokenizer: Tokenizer, answers: Answers, rows: Iterable[int]) -> list[Response]:
    """Some rows of answers that the host holds. No text has the token that ended it."""
    found = []
    for row in rows:
        mask = answers.episodes.response_mask[row]
        tokens = answers.episodes.responses[row][mask]
        found.append(Response(*tokenizer.text_of(tokens), tokens, answers.logprobs[row][mask]))
    return found


def answer_and_measure(
    sampler: Sampler,
    params: dict,
    batches: Iterable[dict],
    measures: Callable[[Answers], dict[str, jax.Array]],
    num_samples: int,
    iteration: int = 0,
) -> tuple[dict[str, np.ndarray], list[dict]]:
    """Has the prompts of a data set answered, always with the same random numbers, and the answers measured.

    Args:
      params, iteration: see `answer`.
      batches: on the mesh, `prompts`, `prompt_lengths` and `index`, which is -1 in rows that only fill a batch.
      measures: MEASURES of a batch of answers, some or all, (B,) float32 and whole on every device.
      num_samples: how many answers to return as text.

    Returns:
      `length` in tokens and the measures of every answer, (N,) arrays; `prompt`, `response` and the measures of the
      first answers.
    """
    found, samples, tokenizer = [], [], sampler.tokenizer
    for batch in batches:
        given = params, batch["prompts"], batch["prompt_lengths"], batch["index"], np.int32(iteration)
        answers = answer_batch(_with_slots(sampler, *given), *given)
        answers, measured = jax.device_get((answers, measures(answers)))
        prompts, lengths, _, mask = answers.episodes
        real = np.flatnonzero(answers.index >= 0)
        found.append({name: x[real] for name, x in ({"length": mask.sum(axis=1)} | measured).items()})
        shown = real[: num_samples - len(samples)]
        for row, response in zip(shown, read(tokenizer, answers, shown), strict=True):
            ids, begun = prompts[row, : lengths[row]], len(tokenizer.start)
            prompt = tokenizer.decode(ids[begun:] if tuple(ids[:begun]) == tokenizer.start else ids)
            numbers = {name: float(measured[name][row]) for name in MEASURES if name in measured}
            samples.append({"prompt": prompt, "response": response.text} | numbers)
    return {name: np.concatenate([x[name] for x in found]) for name in found[0]}, samples


def _with_slots(sampler: Sampler, params: dict, prompts: jax.Array, *others) -> Sampler:
    """The Sampler with a wave that fits: found once for its program."""
    key = sampler, prompts.shape
    if key not in _WAVES:

        def program(wave: int):
            return answer_batch.lower(sampler._replace(wave=wave), params, prompts, *others).compile()

        _WAVES[key] = memory.plan_slots(program, sampler.wave, len(prompts))
    return sampler._replace(wave=_WAVES[key])


_WAVES: dict[tuple, int] = {}


# What networks say of them --------------------------------------------------------------------------------------------


def measures_of(
    networks: dict[str, ModelConfig],
    frozen: dict,
    episodes: Episodes,
    packed: Packed,
    logprobs: jax.Array,
    temperature: float,
    allowed: np.ndarray | None,
) -> dict[str, jax.Array]:
    """`score`, `judge` where there is one, and `kl` of B answers, (B,) float32 each.

    KL is the sum over the response tokens of logprob - ref_logprob.

    Args:
      networks, frozen: shapes and parameters of `reward`, `ref_policy` and perhaps `judge`.
      packed: the episodes.
      logprobs: (B, R) of the response tokens under the policy.
      temperature: of both policies; 0 is 1, see rollout.Rollout.
      allowed: (V,) bool, the ids that both are distributions over; None = all.
    """
    asked = {name: key for name, key in SCALARS.items() if key in networks}
    found = {name: ep.scores(networks[key], frozen[key], episodes, packed) for name, key in asked.items()}
    reference, params = networks["ref_policy"], frozen["ref_policy"]
    head = lambda rows: ep.row_logprobs(reference, params, rows, temperature or 1.0, allowed=allowed)  # noqa: E731
    ref_logprobs = ep.forward_episodes(head, episodes, packed)
    return found | {"kl": jnp.where(episodes.response_mask, logprobs - ref_logprobs, 0.0).sum(axis=1)}


def score(
    network: ModelConfig,
    params: dict,
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    mesh: Mesh,
    rows: int,
    row_length: int,
    microbatch_rows: int,
) -> np.ndarray:
    """(N,) float32: the scalar of a reward model at the end of each text.

    Args:
      network, params: the reward model, frozen.
      prompts, responses: (length,) int32, N of each; a response has its end-of-text token where it ended.
      rows: texts that are read at once.
      row_length, microbatch_rows: of the packed rows; made longer where a prompt and a response are.
    """
    rows, found = padding.rows(rows, mesh), []
    Q, R = max(map(len, prompts)), max(map(len, responses))
    for cut in padding.cuts(len(prompts), rows):
        texts = on_mesh(prompts[cut], responses[cut], (rows, Q, R), mesh)
        scores = score_batch(network, params, texts, max(row_length, Q + R), microbatch_rows)
        found.append(jax.device_get(scores)[: cut.stop - cut.start])
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def score_batch(
    network: ModelConfig, params: dict, episodes: Episodes, row_length: int, microbatch_rows: int
) -> jax.Array:
    """`reward.score` of texts on the mesh, (B,) float32."""
    return constrain(reward.score(network, params, *episodes, row_length, microbatch_rows), None)


def on_mesh(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], shape: tuple[int, int, int], mesh: Mesh
) -> Episodes:
    """Texts of the host on the mesh, padded to (B, Q) prompts and (B, R) responses where `shape` is (B, Q, R)."""
    B, Q, R = shape
    prompts, prompt_lengths = padding.pad(prompts, B, Q)
    responses, lengths = padding.pad(responses, B, R)
    return padding.put(Episodes(prompts, prompt_lengths, responses, np.arange(R) < lengths[:, None]), mesh)


def completions(
    records: Sequence[dict], tokenizer: Tokenizer, of: str, context: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompts and completions of comparisons as `score` reads them: a prompt for each completion, record by record.

    Args:
      of: whose they are, for the error.
      context: tokens that the reward model reads.

    Raises:
      ValueError: a prompt with a completion is longer.
    """
    ends = encoding.completions(records, tokenizer)
    begun = tokenizer.encode_prompts([tokenizer.prompt(chats.prompt_of(record)) for record in records])
    longest = max(len(prompt) + max(map(len, texts)) for prompt, texts in zip(begun, ends, strict=True))
    if longest > context:
        raise ValueError(
            f"prompt and completion of {of} must fit the reward model's context of {context} tokens, or "
            f"config.data.skip_long be set, got {longest}"
        )
    prompts = [ids for ids, texts in zip(begun, ends, strict=True) for _ in texts]
    return prompts, [ids for texts in ends for ids in texts]


def _whole(arrays):
    """Every array whole on every device."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), arrays)
