"""One of our networks as a model of lm-evaluation-harness (extra `eval`, no torch).

    results = lm_eval.simple_evaluate(model=PolicyLM(network, params, tokenizer, mesh, options, seed), tasks=["rte"])

What a task asks comes to `_loglikelihood_tokens`, `loglikelihood_rolling` or `generate_until`; answers go back in the
order of the requests. Contexts that are longer than the model are cut from the left, as the harness's own `hf` cuts
them, and counted in `cut`.
"""

import functools
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from instructgpt_jax.data import chats
from instructgpt_jax.data.tokenizer import Tokenizer
from instructgpt_jax.evaluation.benchmarks import generation, metrics, scoring
from instructgpt_jax.models import ModelConfig

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise ImportError("benchmarks need the extra 'eval' (pip install 'instructgpt-jax[eval]')") from error

MAX_TOKENS = 256  # of an answer where its task does not say: the harness's own default


class Options(NamedTuple):
    """How requests go through the network; none of it changes an answer by more than rounding.

    row_length: T of packed rows; longer contexts get longer rows.
    microbatch_rows: B, rows that go through the network at once.
    batch_size: prompts that are answered at once.
    """

    row_length: int
    microbatch_rows: int
    batch_size: int


class PolicyLM(TemplateLM):
    """A language model on a mesh, for `lm_eval.evaluate` and `simple_evaluate`.

    Attributes:
      cut: contexts that were cut from the left so far.
    """

    def __init__(
        self, network: ModelConfig, params: dict, tokenizer: Tokenizer, mesh: Mesh, options: Options, seed: int
    ):
        """network, params: frozen, see networks.freeze. tokenizer: its chat template writes chats, where it has one."""
        super().__init__()
        self.network, self.params, self.ours, self.mesh = network, params, tokenizer, mesh
        self.options, self.seed, self.cut = options, seed, 0
        self._theirs = tokenizer.pretrained(pad=False)
        self._program = jax.jit(scoring.ending_logprobs, static_argnums=0)  # one for policies of one shape

    @property
    def eot_token_id(self) -> int:
        return self.ours.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS where the tokenizer has one, else EOS."""
        bos = self._theirs.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.network.max_length

    @property
    def tokenizer_name(self) -> str:
        return self.ours.hash

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The program of the run's template; None without one."""
        return self.ours.chat.jinja if self.ours.chat and chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the template writes them, up to where an answer begins, or goes on where they end in one."""
        self.ours.check_messages()
        if add_generation_prompt:
            return self.ours.chat.prompt(chat_history).text + self._space
        *before, last = chat_history
        prompt = self.ours.chat.prompt(before)
        return prompt.text + self.ours.chat.lead + last["content"]

    @property
    def _space(self) -> str:
        """What stands between a chat and its answer and belongs to the answer: the harness moves it there."""
        return self.ours.chat.lead if self.ours.chat.name == chats.HUMAN_ASSISTANT else ""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """The ids of a text, behind BOS where the model was trained with one and the text may begin a sequence.

        Where chats are written by a template the text of a special token is that token, as in the harness's `hf`;
        else it is ordinary text, see data/tokenizer.py.
        """
        if self.ours.chat:
            begins = add_special_tokens is not False and self.ours.chat.name == chats.HUMAN_ASSISTANT
            ids = self._theirs.encode(string, add_special_tokens=False)
            return [*self.ours.start, *ids] if begins else ids
        encode = self.ours.encode if add_special_tokens is False else self.ours.encode_prompts
        return encode([string])[0].tolist()

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each ending behind its context."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[metrics.Loglikelihood]:
        asked = [(context, ending) for _, context, ending in requests]
        o = self.options
        program = functools.partial(self._program, self.network, self.params)
        with jax.set_mesh(self.mesh):
            found, cut = scoring.score(program, asked, self.max_length, o.row_length, o.microbatch_rows, self.mesh)
        self.cut += cut
        return [metrics.Loglikelihood(*one, len(ending)) for one, (_, ending) in zip(found, asked, strict=True)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, every token once, in windows of the model's context."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            given = self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            for pair in utils.get_rolling_token_windows(*given):
                windows.append((None, *utils.make_disjoint_window(pair)))
                owners.append(number)
        found = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            found[number] += logprob
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """An answer to each context up to the first stop text; those that are asked in one manner together."""
        alike: dict[generation.Manner, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(generation.manner(request.args[1], MAX_TOKENS), []).append(number)
        found = [""] * len(requests)
        for how, numbers in alike.items():
            texts = [requests[number].args[0] for number in numbers]
            if self.ours.chat and self._space:
                texts = [text.removesuffix(self._space) for text in texts]
            texts, cut = generation.generate(
                self.network,
                self.params,
                self.ours,
                [self.tok_encode(text) or [self.prefix_token_id] for text in texts],
                numbers,
                how,
                self.options.batch_size,
                self.seed,
                self.mesh,
            )
            self.cut += cut
            for number, text in zip(numbers, texts, strict=True):
                found[number] = text
        return found
