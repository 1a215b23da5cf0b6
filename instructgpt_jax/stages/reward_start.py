"""What a reward model begins with, where comparisons are few: the token that ends a completion, and the head.

Both are off in the paper's configurations. A language model that becomes a reward model gets a random projection to one
scalar, and reads the score at the end of text, a token whose state it never had to use. A few hundred comparisons leave
much of that as it was, so it should be no hindrance from the start.
"""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import losses, models, networks, process
from instructgpt_jax.data.datasets import StageData
from instructgpt_jax.data.tokenizer import Tokenizer
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.networks import Network
from instructgpt_jax.sharding import constrain, replicated
from instructgpt_jax.training.state import count_nonempty


def params(config: ConfigDict, network: Network, data: StageData, mesh: Mesh) -> dict:
    """The parameters before the first update, on the mesh.

    A network that is a reward model already has learned both, and keeps them; the states of a fresh one say nothing
    that a head could read.

    Args:
      config: `config.reward` has `eos_init`, `head_examples` and `head_l2`.
      network: of `config.models.model`, with a scalar head.
      data: comparisons.
    """
    section, found = config.reward, network.load()  # of a network with an adapter: no embedding, see validate
    twin, eos = eos_twin(section, data.tokenizer), data.tokenizer.end_id
    if twin is not None and (network.grown or not config.models.model.init_from):
        tokens = found["embed"]["tokens"]
        copy = jax.jit(lambda x: x.at[eos].set(x[twin]), out_shardings=tokens.sharding)
        found = found | {"embed": found["embed"] | {"tokens": copy(tokens)}}
    if section.head_examples and network.grown:
        whole = networks.join(network, found)
        states, ranks = comparison_states(network.config, whole, data, section.head_examples, mesh)
        head = found["scalar_head"]
        kernel = jax.device_put(fit_head(states, ranks, section.head_l2), head["kernel"].sharding)
        found = found | {"scalar_head": head | {"kernel": kernel}}
    return found


def eos_twin(section: ConfigDict, tokenizer: Tokenizer) -> int | None:
    """The token whose embedding the one that ends a completion starts with, `config.reward.eos_init`; None = its own.

    The score is read there, at the end of text, where a language model has no use for the text behind: another document
    follows. A token that may or may not be the last of a text, such as a full stop, has a state that knows.
    """
    text = section.eos_init
    ids = tokenizer.encode([text])[0] if text else ()
    if text and len(ids) != 1:
        raise ValueError(f"config.reward.eos_init must be one token of the tokenizer, got {text!r}: {len(ids)} tokens")
    return int(ids[0]) if text else None


def end_states(config: ModelConfig, params: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
    """(M, G, K, D) float32: the last hidden state of each completion of a batch of comparisons; (M, G, K) ranks."""

    def one(i, states):
        rows = jax.tree.map(lambda x: x[i], batch)
        hidden = models.hidden(
            config, params, rows["tokens"], rows["positions"], rows["segments"], rows.get("branches")
        )
        hidden = constrain(hidden, None, None, None)
        ends = hidden[rows["ends"][..., 0], rows["ends"][..., 1]]
        return states.at[i].set(ends.astype(jnp.float32))

    zeros = jnp.zeros((*batch["ranks"].shape, config.embedding_width), jnp.float32)
    return jax.lax.fori_loop(0, count_nonempty(batch["segments"]), one, zeros), batch["ranks"]


def comparison_states(
    config: ModelConfig, params: dict, data: StageData, examples: int, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """The end states (P, K, D) and ranks (P, K) of the first batches of training that hold `examples` comparisons."""
    states_of = jax.jit(functools.partial(end_states, config), out_shardings=replicated(mesh))
    found, count = [], 0
    with contextlib.closing(data.train(0)) as batches:
        for batch in itertools.islice(batches, data.steps_per_epoch):
            states, ranks = (np.asarray(x).reshape(-1, *x.shape[2:]) for x in states_of(params, batch))
            used = (ranks > 0).any(axis=1)
            found.append((states[used], ranks[used]))
            count += int(used.sum())
            if count >= examples:
                break
    states, ranks = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return states, ranks


def fit_head(states: np.ndarray, ranks: np.ndarray, l2: float) -> np.ndarray:
    """The head that ranks best on the states as they are: a logistic regression (linear probing before fine-tuning,
    Kumar et al. 2022, "Fine-tuning can distort pretrained features and underperform out-of-distribution").

        w = argmin ranking_loss(states · w, ranks) + l2/2 |w|²

    Args:
      states: (P, K, D) float32, the state where each completion ends.
      ranks: (P, K) int32, see losses.ranking_loss.
      l2: strength of the penalty, above 0: the loss is a mean, so it does not grow with P.

    Returns:
      (D,) float32.
    """

    import scipy.optimize  # a quarter of a second that no other run pays

    @jax.jit
    def objective(w, states, ranks):
        def value(w):
            loss, aux = losses.ranking_loss(states @ w, ranks)
            return loss + 0.5 * l2 * w @ w, aux["correct"] / aux["pairs"]

        (total, accuracy), gradient = jax.value_and_grad(value, has_aux=True)(w)
        return total, gradient, accuracy

    def evaluated(w):
        total, gradient, _ = objective(w.astype(np.float32), states, ranks)
        return float(total), np.asarray(gradient, np.float64)

    found = scipy.optimize.minimize(evaluated, np.zeros(states.shape[-1]), jac=True, method="L-BFGS-B")
    kernel = found.x.astype(np.float32)
    total, _, accuracy = objective(kernel, states, ranks)
    said = f"{len(states)} comparisons, loss {float(total):.3f}, accuracy {float(accuracy):.3f}"
    process.say(f"reward: a linear head on the states of {said}")
    return kernel
