"""Answers of a policy to prompts, and what the frozen networks say of them.

One program samples for each architecture and width of prompts, one reads all answers, so that ten policies of one size
compile twice. Policies come one after another; the reference, the reward model and the judge stay in memory.
"""

import dataclasses
import functools
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import episodes as ep
from instructgpt_jax import networks, rollout, sharding
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.episodes import Episodes
from instructgpt_jax.evaluation import batches
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.networks import Network

NARROW = 3  # most prompts are much shorter than the longest: those up to a third of it go through a narrower program


class Examiner:
    """Samples answers and scores texts.

    Args:
      config: `seed` and the section `evaluate`.
      frozen: `ref_policy`, `reward` and perhaps `judge`, as shapes; loaded when first used.
    """

    def __init__(self, config: ConfigDict, tokenizer, frozen: dict[str, Network], mesh: Mesh):
        self._seed, self._options, self._tokenizer, self._mesh = config.seed, config.evaluate, tokenizer, mesh
        self._networks = {name: _runtime(network.config) for name, network in frozen.items()}
        self._load = frozen
        whole = sharding.replicated(mesh)  # so that every process can read what comes out
        self._sample = jax.jit(self._sample_batch, static_argnums=0, out_shardings=whole)
        self._read = jax.jit(self._read_batch, out_shardings=whole)
        self._score = jax.jit(self._score_batch, static_argnums=(0, 3), out_shardings=whole)

    @functools.cached_property
    def _frozen(self) -> dict[str, dict]:
        return {name: networks.freeze(network) for name, network in self._load.items()}

    def answer(self, network: ModelConfig, params: dict, stream: str, prompts: Sequence[str], prefix: str = ""):
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
        bare = batches.encode(self._tokenizer, prompts)
        seen = batches.encode(self._tokenizer, [prefix + prompt for prompt in prompts]) if prefix else bare
        longest_bare = self._options.max_prompt_length
        longest = longest_bare + self._options.prefix.max_length * bool(prefix)
        widths = (-(-longest // NARROW), longest)
        groups = {width: [] for width in widths}
        for number in sorted(range(len(prompts)), key=lambda i: len(seen[i])):
            groups[widths[0] if len(seen[number]) <= widths[0] else widths[1]].append(number)
        network, answers = _runtime(network), [None] * len(prompts)
        iteration = np.int32(zlib.crc32(stream.encode()) & 0x7FFFFFFF)
        rows = self._options.batch_size
        for width, numbers in groups.items():
            for cut in batches.cuts(len(numbers), rows):
                chosen = numbers[cut]
                context = (*batches.pad([seen[i] for i in chosen], rows, width), batches.fill(np.int32(chosen), rows))
                responses = self._sample(network, params, *batches.put(context, self._mesh), iteration)
                plain = batches.put(batches.pad([bare[i] for i in chosen], rows, longest_bare), self._mesh)
                read = self._read(self._frozen, Episodes(*plain, responses.tokens, responses.mask), responses.logprobs)
                tokens, mask, values = jax.device_get((responses.tokens, responses.mask, read))
                for row, number in enumerate(chosen):
                    answers[number] = self._describe(tokens[row][mask[row]], {k: v[row] for k, v in values.items()})
        return answers

    def score(self, name: str, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """(N,) float32 scores by the frozen network `name` of written completions, each read to its end-of-text token.

        Raises:
          ValueError: prompt and completion are longer than the network's context.
        """
        eos = np.array([self._tokenizer.eos_token_id], np.int32)
        begun = batches.encode(self._tokenizer, prompts)
        ends = [np.append(ids, eos) for ids in tokenizers.encode(self._tokenizer, completions)]
        Q, R, rows = max(map(len, begun)), max(map(len, ends)), self._options.batch_size
        row_length = max(self._options.row_length, Q + R)
        networks.check_context("prompt and completion of config.evaluate.accuracy", row_length, self._networks[name])
        scores = []
        for cut in batches.cuts(len(begun), rows):
            batch = batches.put((*batches.pad(begun[cut], rows, Q), *batches.pad(ends[cut], rows, R)), self._mesh)
            found = self._score(name, self._frozen[name], batch, row_length)
            scores.append(jax.device_get(found)[: cut.stop - cut.start])
        return np.concatenate(scores)

    def _describe(self, ids: np.ndarray, values: dict) -> dict:
        ended = bool(ids[-1] == self._tokenizer.eos_token_id)
        text = self._tokenizer.decode(ids[:-1] if ended else ids)
        return {"text": text, "ended": ended, "length": len(ids)} | {k: float(v) for k, v in values.items()}

    def _sample_batch(self, network, params, prompts, lengths, index, iteration):
        options, eos_id = self._options, self._tokenizer.eos_token_id
        return rollout.respond(
            network, params, prompts, lengths, index, options, self._seed, eos_id, iteration=iteration
        )

    def _read_batch(self, frozen, answers: Episodes, logprobs) -> dict[str, jax.Array]:
        options = self._options
        packed = ep.pack(answers, options.row_length, options.microbatch_rows)
        scores = {"reward": "score", "judge": "judge"}
        found = {
            key: ep.scores(self._networks[name], frozen[name], answers, packed)
            for name, key in scores.items()
            if name in frozen
        }
        ref = functools.partial(ep.row_logprobs, self._networks["ref_policy"], frozen["ref_policy"])
        temperature = options.temperature or 1.0
        ref_logprobs = ep.forward_episodes(lambda rows: ref(rows, temperature), answers, packed)
        return found | {"kl": jnp.sum(jnp.where(answers.response_mask, logprobs - ref_logprobs, 0.0), axis=1)}

    def _score_batch(self, name: str, params: dict, batch: tuple, row_length: int) -> jax.Array:
        prompts, lengths, completions, completion_lengths = batch
        mask = jnp.arange(completions.shape[1])[None] < completion_lengths[:, None]
        answers = Episodes(prompts, lengths, completions, mask)
        packed = ep.pack(answers, row_length, self._options.microbatch_rows)
        return ep.scores(self._networks[name], params, answers, packed)


def _runtime(network: ModelConfig) -> ModelConfig:
    """Without what only training knows, so that models of one shape share a program."""
    off = {"residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0, "remat": "none"}
    return dataclasses.replace(network, **off)
