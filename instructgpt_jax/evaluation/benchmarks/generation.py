"""Answers of a policy up to one of several texts, for tasks that generate."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from instructgpt_jax import responses
from instructgpt_jax.data import padding
from instructgpt_jax.data.tokenizer import Tokenizer
from instructgpt_jax.models import ModelConfig

WIDTH = 64  # prompts are padded to a multiple of it, so that few programs are compiled


class Manner(NamedTuple):
    """How a task has its prompts answered.

    until: texts of which the first one ends an answer, and is not part of it.
    max_tokens: of an answer.
    temperature: 0 = greedy.
    top_k, top_p: see rollout.generate.
    """

    until: tuple[str, ...]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float


def manner(given: dict, max_tokens: int) -> Manner:
    """What `generation_kwargs` of a task of lm-evaluation-harness say.

    Args:
      given: `until`, `max_gen_toks` or one of its other names, `do_sample`, `temperature`, `top_k`, `top_p`.
      max_tokens: where they name none.

    Raises:
      ValueError: a key that is not known here.
    """
    given = dict(given)
    until = given.pop("until", None) or ()
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first counts
    limits = [given.pop(name) for name in names if given.get(name) is not None]
    temperature = float(given.pop("temperature", None) or 0.0)
    sampled = given.pop("do_sample", None)
    if sampled and not temperature:
        temperature = 1.0
    top_k, top_p = int(given.pop("top_k", 0) or 0), float(given.pop("top_p", 1.0) or 1.0)
    left = {key: value for key, value in given.items() if value is not None and (key, value) != ("num_beams", 1)}
    if left:
        raise ValueError(f"generation_kwargs of a task must be of until, {names}, do_sample, temperature, top_k and "
                         f"top_p, got {left}")  # fmt: skip
    texts = (until,) if isinstance(until, str) else tuple(until)
    chosen = 0.0 if sampled is False else temperature
    return Manner(tuple(text for text in texts if text), int(limits[0] if limits else max_tokens), chosen, top_k, top_p)


def generate(
    network: ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    index: Sequence[int],
    how: Manner,
    rows: int,
    seed: int,
    mesh: Mesh,
) -> tuple[list[str], int]:
    """An answer to each prompt, and how many prompts were cut from the left to leave it room.

    A token that holds a stop text ends its answer at once; one that is spelled by several tokens is cut afterwards.

    Args:
      prompts: ids, at least one each.
      index: of each prompt, for its random numbers.
      rows: prompts that are answered at once; a third of that of long ones.
      seed: of the random numbers.

    Raises:
      ValueError: no room for a prompt beside the answer.
    """
    room = network.max_length - how.max_tokens
    if room < 1:
        raise ValueError(
            f"max_gen_toks of a task must be less than the model's context of {network.max_length}, got "
            f"{how.max_tokens}"
        )
    kept = [np.array(ids[-room:], np.int32) for ids in prompts]
    stopping = dataclasses.replace(tokenizer, end_ids=stop_ids(tokenizer, how.until))
    sampler = responses.Sampler(
        network.replace(remat="none"), stopping, seed, how.max_tokens, how.temperature, how.top_k, how.top_p, 0
    )
    widest = min(room, -(-max(map(len, kept)) // WIDTH) * WIDTH)
    sizes = [padding.rows(wanted, mesh) for wanted in (rows, -(-rows // padding.NARROW))]
    batches = padding.by_width([len(ids) for ids in kept], widest, *sizes)
    found = [""] * len(prompts)
    with jax.set_mesh(mesh):
        for batch, some in responses.answer(sampler, params, kept, index, batches, mesh):
            for place, response in zip(batch.places, some, strict=True):
                found[place] = text_of(tokenizer, response.tokens, how.until)
    return found, sum(len(ids) > room for ids in prompts)


def text_of(tokenizer: Tokenizer, tokens: np.ndarray, until: Sequence[str]) -> str:
    """The text of an answer's tokens before the first of the stop texts, without the token that ended it."""
    ended = len(tokens) > 0 and int(tokens[-1]) in tokenizer.end_ids
    text = tokenizer.decode(tokens[:-1] if ended else tokens)
    text = tokenizer.chat.content_of(text) if tokenizer.chat else text
    places = [place for place in map(text.find, until) if place >= 0]
    return text[: min(places)] if places else text


@functools.lru_cache
def stop_ids(tokenizer: Tokenizer, until: tuple[str, ...]) -> tuple[int, ...]:
    """The tokenizer's end tokens, and every token that holds one of the texts."""
    holding = {i for i, text in _texts(tokenizer).items() if any(stop in text for stop in until)}
    return tuple(sorted({*tokenizer.end_ids, *holding}))


@functools.lru_cache
def _texts(tokenizer: Tokenizer) -> dict[int, str]:
    """id -> text of every token that can be sampled."""
    return {i: tokenizer.decode([i]) for i in tokenizer.vocabulary().values() if i < tokenizer.vocab_size}
