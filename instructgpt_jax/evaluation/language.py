"""What a policy still knows of its pretraining: its loss on text, and closed tasks by the likeliest of the choices."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instructgpt_jax import episodes as ep
from instructgpt_jax import losses, models
from instructgpt_jax.data import chats, padding
from instructgpt_jax.data.tokenizer import Tokenizer
from instructgpt_jax.episodes import Episodes
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.sharding import constrain


def pretraining_losses(
    network: ModelConfig, params: dict, sequences: Sequence[np.ndarray], rows: int, mesh: Mesh
) -> list[float]:
    """Nats a token of each sequence of running text, the mean over all its tokens but the first.

    Args:
      network, params: a language model.
      sequences: (T,) int32 each.
      rows: sequences that go through the network at once.
    """
    found = []
    for cut in padding.cuts(len(sequences), rows):
        tokens = padding.put(padding.fill(np.stack(sequences[cut]), rows), mesh)
        found += jax.device_get(_row_losses(network, params, tokens))[: cut.stop - cut.start].tolist()
    return found


@functools.partial(jax.jit, static_argnums=0)
def _row_losses(network: ModelConfig, params: dict, tokens: jax.Array) -> jax.Array:
    """(b,) float32, of (b, T) tokens."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = models.hidden(network, params, tokens, positions, jnp.ones_like(tokens))
    kernel, bias = models.unembedding(network, params)
    mask = jnp.ones_like(tokens).at[:, -1].set(0)  # column t predicts token t + 1
    targets = jnp.roll(tokens, -1, axis=1)
    logprobs = losses.token_logprobs(hidden, kernel, targets, vocab_size=network.vocab_size, bias=bias, mask=mask)
    return constrain(-jnp.where(mask > 0, logprobs, 0.0).sum(axis=1) / (tokens.shape[1] - 1), None)


def closed_task(
    network: ModelConfig, params: dict, tokenizer: Tokenizer, records: Sequence[dict], options, mesh: Mesh
) -> dict[str, list[float]]:
    """1 for each record whose right choice is the likeliest after the prompt, else 0, by two rules.

    Args:
      network, params: a language model.
      records: `prompt` or `messages`, `choices` and `answer`, the number of the right one.
      options: `batch_size`, `row_length` and `microbatch_rows`.

    Returns:
      `sum`: the likeliest by its log-probability. `mean`: by its log-probability per token, the rule of Ouyang et al.
      2022, appendix D; the two differ where choices have different numbers of tokens.
    """
    starts = np.cumsum([0, *(len(record["choices"]) for record in records)])
    asked = [(chats.prompt_of(record), choice) for record in records for choice in record["choices"]]
    logprobs, lengths = (np.asarray(x) for x in choice_logprobs(network, params, tokenizer, asked, options, mesh))
    found = {}
    for rule, values in (("sum", logprobs), ("mean", logprobs / np.maximum(lengths, 1))):
        best = [int(np.argmax(values[low:high])) for low, high in zip(starts, starts[1:], strict=False)]
        found[rule] = [float(guess == record["answer"]) for guess, record in zip(best, records, strict=True)]
    return found


def choice_logprobs(
    network: ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    asked: Sequence[tuple[chats.Prompt, str]],
    options,
    mesh: Mesh,
) -> tuple[list[float], list[int]]:
    """The log-probability of each text after its prompt, summed over its tokens, and the number of these.

    Args:
      network, params: a language model.
      asked: prompts and what may follow them.
      options: `batch_size`, `row_length` and `microbatch_rows`.
    """
    prompts = tokenizer.encode_prompts([tokenizer.prompt(prompt) for prompt, _ in asked])
    choices = tokenizer.encode([tokenizer.answer(prompt, choice, ended=False) for prompt, choice in asked])
    Q, R = max(map(len, prompts)), max(map(len, choices))
    logprobs = []
    for cut in padding.cuts(len(prompts), options.batch_size):
        tokens, lengths = padding.pad(prompts[cut], options.batch_size, Q)
        chosen, counts = padding.pad(choices[cut], options.batch_size, R)
        episodes = Episodes(tokens, lengths, chosen, np.arange(R)[None] < counts[:, None])
        found = _response_logprobs(
            network, params, padding.put(episodes, mesh), max(options.row_length, Q + R), options.microbatch_rows
        )
        logprobs += jax.device_get(found)[: cut.stop - cut.start].tolist()
    return logprobs, [len(choice) for choice in choices]


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _response_logprobs(
    network: ModelConfig, params: dict, episodes: Episodes, row_length: int, microbatch_rows: int
) -> jax.Array:
    """(B,) float32, summed over each response."""
    packed = ep.pack(episodes, row_length, microbatch_rows)
    head = lambda rows: ep.row_logprobs(network, params, rows, 1.0)  # noqa: E731
    return constrain(ep.forward_episodes(head, episodes, packed).sum(axis=1), None)


def chance(records: Sequence[dict]) -> float:
    """The share of records that guessing gets right."""
    return float(np.mean([1 / len(record["choices"]) for record in records]))
