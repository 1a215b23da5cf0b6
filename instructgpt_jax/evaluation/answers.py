"""Answers of a policy to prompts, and what the frozen networks say of them.

One program samples for each architecture and width of prompts, one reads all answers, so that ten policies of one size
compile twice. Policies come one after another; the reference, the reward model and the judge stay in memory.
"""

import functools
import zlib
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import episodes as ep
from instructgpt_jax import networks, responses
from instructgpt_jax.data import chats, padding
from instructgpt_jax.data.tokenizer import Tokenizer
from instructgpt_jax.episodes import Episodes
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.networks import Network
from instructgpt_jax.sharding import replicated


class Examiner:
    """Samples answers and scores texts.

    Args:
      config: `seed` and the section `evaluate`.
      tokenizer: of all networks.
      frozen: `ref_policy`, `reward` and perhaps `judge`, as shapes; loaded when first used.
    """

    def __init__(self, config: ConfigDict, tokenizer: Tokenizer, frozen: dict[str, Network], mesh: Mesh):
        self._options, self._seed = config.evaluate, config.seed
        self.tokenizer, self._mesh, self._networks = tokenizer, mesh, frozen
        self._program = jax.jit(self._measures_of, out_shardings=replicated(mesh))  # one for all policies

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
          prefix: text before every prompt that the policy sees and the other networks do not; "" with a chat template.

        Returns:
          for each prompt `text` (without the token that ended it), `ended`, `length` in tokens, `score`, `judge` where
          there is one, and `kl`: the sum over the response tokens of logprob - ref_logprob, at the sampling
          temperature (at 1 when greedy).
        """
        c = self._options
        bare = self.tokenizer.encode_prompts([self.tokenizer.prompt(chats.given(prompt)) for prompt in prompts])
        seen = self.tokenizer.encode_prompts([prefix + prompt for prompt in prompts]) if prefix else bare
        widest = c.max_prompt_length + c.prefix.max_length * bool(prefix)
        rows = [padding.rows(wanted, self._mesh) for wanted in (c.batch_size, -(-c.batch_size // padding.NARROW))]
        order = sorted(range(len(seen)), key=lambda place: seen[place].tobytes())  # answers to one prompt come together
        asked = [seen[place] for place in order]
        batches = padding.by_width([len(ids) for ids in asked], widest, *rows)  # about as many tokens in both
        sampler = responses.sampler_of(network, self.tokenizer, c, self._seed)
        iteration = zlib.crc32(stream.encode()) & 0x7FFFFFFF
        answers: list[dict] = [{}] * len(prompts)
        for batch, found in responses.answer(sampler, params, asked, order, batches, self._mesh, iteration):
            places = [order[number] for number in batch.places]
            for cut in padding.cuts(len(places), batch.rows):
                measured = self._measure([bare[place] for place in places[cut]], found[cut], batch.rows)
                for row, (place, one) in enumerate(zip(places[cut], found[cut], strict=True)):
                    numbers = {name: float(values[row]) for name, values in measured.items()}
                    answers[place] = {"text": one.text, "ended": one.ended, "length": len(one.tokens)} | numbers
        return answers

    def _measure(self, prompts: list[np.ndarray], found: list[responses.Response], rows: int) -> dict[str, np.ndarray]:
        """What the frozen networks say of some responses, (rows,) float32 by name; behind them is what fills the batch.

        Two tokens each: packed rows cost what their tokens do.
        """
        c, short, missing = self._options, found[0], rows - len(found)
        short = short._replace(tokens=short.tokens[:1], logprobs=short.logprobs[:1])
        prompts, found = [*prompts, *[prompts[0][:1]] * missing], [*found, *[short] * missing]
        shape = rows, c.max_prompt_length, c.response_length
        texts = responses.on_mesh(prompts, [one.tokens for one in found], shape, self._mesh)
        logprobs, _ = padding.pad([one.logprobs for one in found], rows, c.response_length)
        logprobs = padding.put(logprobs, self._mesh)
        return jax.device_get(self._program(self._frozen, texts, logprobs))

    def _measures_of(self, frozen: dict, texts: Episodes, logprobs: jax.Array) -> dict[str, jax.Array]:
        """responses.measures_of; the reference is a distribution over the ids of the tokenizer, as the policy is."""
        c, shapes = self._options, {name: network.config for name, network in self._networks.items()}
        packed = ep.pack(texts, c.row_length, c.microbatch_rows)
        allowed = self.tokenizer.allowed(shapes["ref_policy"].vocab_size)
        return responses.measures_of(shapes, frozen, texts, packed, logprobs, c.temperature, allowed)

    def score(self, name: str, records: Sequence[dict]) -> np.ndarray:
        """(N,) float32 scores by the frozen network `name` of the completions of comparisons, one record after another.

        Raises:
          ValueError: prompt and completion are longer than the network's context.
        """
        c, network = self._options, self._networks[name].config
        texts = responses.completions(records, self.tokenizer, "config.evaluate.accuracy", network.max_length)
        params = self._frozen[name]
        return responses.score(network, params, *texts, self._mesh, c.batch_size, c.row_length, c.microbatch_rows)
