"""Answers of a policy to prompts, and what the frozen networks say of them.

One program samples for each architecture and width of prompts, one reads all answers, so that ten policies of one size
compile twice. Policies come one after another; the reference, the reward model and the judge stay in memory.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import episodes as ep
from instructgpt_jax import networks, rollout
from instructgpt_jax.data import encoding, padding
from instructgpt_jax.data.tokenizer import Tokenizer
from instructgpt_jax.episodes import Episodes
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.networks import Network
from instructgpt_jax.sharding import constrain

SCORES = {"score": "reward", "judge": "judge"}  # how the scalar of a network is called


class Options(NamedTuple):
    """The numbers of `config.evaluate` that the programs below are compiled for."""

    response_length: int
    temperature: float
    top_k: int
    top_p: float
    row_length: int
    microbatch_rows: int


class Examiner:
    """Samples answers and scores texts.

    Args:
      config: `seed` and the section `evaluate`.
      tokenizer: of all networks.
      frozen: `ref_policy`, `reward` and perhaps `judge`, as shapes; loaded when first used.
    """

    def __init__(self, config: ConfigDict, tokenizer: Tokenizer, frozen: dict[str, Network], mesh: Mesh):
        c = config.evaluate
        self._rows, self._longest, self._longest_prefix = c.batch_size, c.max_prompt_length, c.prefix.max_length
        self._options = Options(*(c[name] for name in Options._fields))
        self._seed, self.tokenizer, self._mesh, self._networks = config.seed, tokenizer, mesh, frozen

    @functools.cached_property
    def _frozen(self) -> dict[str, dict]:
        return {name: networks.freeze(network) for name, network in self._networks.items()}

    def answer(
        self, network: ModelConfig, params: dict, stream: str, prompts: Sequence[str], prefix: str = ""
    ) -> list[dict]:
        """A sampled answer to each prompt.

        Args:
          network, params: of the policy.
          stream: names the random numbers; another name, other samples.
          prompts: at most `max_prompt_length` tokens each.
          prefix: text before every prompt that the policy sees and the other networks do not.

        Returns:
          for each prompt `text` (without the end-of-text token), `ended`, `length` in tokens, `score`, `judge` where
          there is one, and `kl`: the sum over the response tokens of logprob - ref_logprob, at the sampling
          temperature (at 1 when greedy).
        """
        bare = self.tokenizer.encode_prompts(prompts)
        seen = self.tokenizer.encode_prompts([prefix + prompt for prompt in prompts]) if prefix else bare
        widest = self._longest + self._longest_prefix * bool(prefix)

        configs = tuple((name, net.config) for name, net in self._networks.items())
        iteration = np.int32(zlib.crc32(stream.encode()) & 0x7FFFFFFF)
        answers: list[dict] = [{}] * len(prompts)
        for width, numbers in padding.by_width([len(ids) for ids in seen], widest).items():
            wanted = -(-self._rows // padding.NARROW) if width == widest else self._rows  # about as many tokens in both
            rows = padding.rows(wanted, self._mesh)
            for cut in padding.cuts(len(numbers), rows):
                chosen = numbers[cut]
                index = padding.fill(np.array(chosen, np.int32), rows)
                context = self._put((*padding.pad([seen[i] for i in chosen], rows, width), index))
                program = (network.replace(remat="none"), self._options, self._seed, self.tokenizer)
                response = sample(*program, params, *context, iteration)
                plain = self._put(padding.pad([bare[i] for i in chosen], rows, self._longest))
                read = Episodes(*plain, response.tokens, response.mask)
                values = values_of(
                    configs, self._options, self.tokenizer, self._frozen, read, response.logprobs, len(chosen)
                )
                tokens, mask, values = jax.device_get((response.tokens, response.mask, values))
                for row, number in enumerate(chosen):
                    answers[number] = self._describe(tokens[row][mask[row]], {k: v[row] for k, v in values.items()})
        return answers

    def score(self, name: str, records: Sequence[dict]) -> np.ndarray:
        """(N,) float32 scores by the frozen network `name` of the completions of comparisons, one record after another.

        Raises:
          ValueError: prompt and completion are longer than the network's context.
        """
        completions = encoding.completions(records, self.tokenizer)
        prompts = self.tokenizer.encode_prompts([record["prompt"] for record in records])
        begun = [ids for ids, ends in zip(prompts, completions, strict=True) for _ in ends]
        ends = [ids for texts in completions for ids in texts]
        Q, R, network = max(map(len, begun)), max(map(len, ends)), self._networks[name].config
        options = self._options._replace(row_length=max(self._options.row_length, Q + R))
        networks.check_context("prompt and completion of config.evaluate.accuracy", options.row_length, network)
        scores = []
        for cut in padding.cuts(len(begun), self._rows):
            texts = padding.pad(ends[cut], self._rows, R)
            batch = self._put((*padding.pad(begun[cut], self._rows, Q), *texts))
            found = scores_of(network, options, self._frozen[name], *batch)
            scores.append(jax.device_get(found)[: cut.stop - cut.start])
        return np.concatenate(scores)

    def _put(self, arrays):
        return padding.put(arrays, self._mesh)

    def _describe(self, ids: np.ndarray, values: dict) -> dict:
        ended = bool(ids[-1] == self.tokenizer.eos_id)
        text = self.tokenizer.decode(ids[:-1] if ended else ids)
        return {"text": text, "ended": ended, "length": len(ids)} | {k: float(v) for k, v in values.items()}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def sample(
    network: ModelConfig, options: Options, seed: int, tokenizer: Tokenizer, params, prompts, lengths, index, iteration
):
    """Responses to (B, Q) prompts, see rollout.generate; whole on every device, as is all that follows."""
    found = rollout.respond(network, params, prompts, lengths, index, options, seed, tokenizer, iteration=iteration)
    return jax.tree.map(lambda x: constrain(x, None, None), found)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def values_of(
    networks: tuple,
    options: Options,
    tokenizer: Tokenizer,
    frozen: dict,
    answers: Episodes,
    logprobs: jax.Array,
    count: int,
) -> dict[str, jax.Array]:
    """`score`, `judge` and `kl` of the first `count` of B answers, each (B,) float32; the others are not read.

    Args:
      networks: (name, ModelConfig) of the frozen networks.
      tokenizer: of the answers: the reference is a distribution over its ids, as the policy is.
      logprobs: (B, R) of the response tokens under the policy.
    """
    real, R = jnp.arange(len(answers.prompts)) < count, answers.responses.shape[1]
    answers = answers._replace(  # two tokens of each of the others: packed rows cost what their tokens do
        prompt_lengths=jnp.where(real, answers.prompt_lengths, 1),
        response_mask=answers.response_mask & (real[:, None] | (jnp.arange(R) == 0)),
    )
    packed, configs = ep.pack(answers, options.row_length, options.microbatch_rows), dict(networks)
    found = {
        key: ep.scores(configs[name], frozen[name], answers, packed) for key, name in SCORES.items() if name in configs
    }
    temperature = options.temperature or 1.0
    reference = configs["ref_policy"]
    allowed = tokenizer.allowed(reference.vocab_size)
    head = lambda rows: ep.row_logprobs(  # noqa: E731
        reference, frozen["ref_policy"], rows, temperature, allowed=allowed
    )
    gap = jnp.where(answers.response_mask, logprobs - ep.forward_episodes(head, answers, packed), 0.0)
    return {key: constrain(x, None) for key, x in (found | {"kl": gap.sum(axis=1)}).items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def scores_of(network: ModelConfig, options: Options, params, prompts, lengths, completions, completion_lengths):
    """(B,) float32 scores of written completions (B, R)."""
    mask = jnp.arange(completions.shape[1])[None] < completion_lengths[:, None]
    texts = Episodes(prompts, lengths, completions, mask)
    packed = ep.pack(texts, options.row_length, options.microbatch_rows)
    return constrain(ep.scores(network, params, texts, packed), None)
