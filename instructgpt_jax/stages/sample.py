"""Answers to prompts, by any checkpoint or Hugging Face directory.

With a chat template (`config.data.template`) the terminal is a dialogue: each line is the user's next turn, and an
empty line begins another dialogue. Else each line is a prompt by itself.

The prompts come from `config.sample.prompts`, from `config.sample.file` (.jsonl or .jsonl.gz with records of prompts,
else text with a prompt a line, plain or gzip), or, where both are empty, from the terminal, a line at a time. Text is
UTF-8, and a line ends at its line feed. Each answer is printed and becomes a line of `samples.jsonl` in the workdir.
"""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import errors, networks, paths, process, responses, run_tokenizer
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.cluster import agreeing
from instructgpt_jax.data import chats, jsonl, padding, schema, sources, templates
from instructgpt_jax.data import tokenizer as tokenizers

RULE = "-" * 80  # between printed answers
SHORTEST = 16  # columns that prompts are padded to at least; then powers of two, so that few programs are compiled


class Prompt(NamedTuple):
    """A prompt, and where it stands; its text is a `chats.Dialogue` where it is messages."""

    origin: str
    text: str


def run(config: ConfigDict, mesh: Mesh, workdir: str) -> None:
    """Answers every prompt.

    Raises:
      ValueError: a prompt that is no text or leaves no room for an answer; no prompt at all; a workdir that cannot be
        made.
    """
    source = config.models.model.init_from
    given = read_prompts(config)
    agreeing.same("prompts", {prompt.origin: prompt.text for prompt in given})
    if not given and jax.process_count() > 1:
        raise ValueError(f"config.sample.file or prompts must be set with {jax.process_count()} processes, got neither")
    folder = paths.make_folder("workdir", workdir)
    tokenizer = run_tokenizer.load_for(config)
    answer = make_answer(config, mesh, tokenizer)

    def keep(answers: Iterable[dict]) -> None:
        with adding(folder / "samples.jsonl") as add:
            for one in answers:
                if jax.process_index() == 0:
                    print(f"{RULE}\n" * (len(given) > 1) + shown(one), flush=True)
                    add(json.dumps({"model": source, **one}, ensure_ascii=False) + "\n")

    def shown(one: dict) -> str:
        if tokenizer.chat is None:
            return one["prompt"] + one["response"]
        return (one["prompt"] + "\n\n") * bool(given) + one["response"]

    if given:
        keep(answer(given, 0))
        return
    said: list[dict] = []  # of the dialogue, where there is a template
    for number, line in enumerate(_typed(bool(tokenizer.chat))):
        if not line:
            said = []
            continue
        try:
            turns = [*said, {"role": "user", "content": line}]
            found = list(answer([Prompt("the prompt", chats.Dialogue(turns) if tokenizer.chat else line)], number))
            keep(found)
            said = [*turns, {"role": schema.ASSISTANT, "content": found[0]["response"]}]
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)


@contextlib.contextmanager
def adding(path: epath.Path) -> Iterator[Callable[[str], None]]:
    """Yields what adds a line to a file: at once, or at the end where an object store has no append."""
    lines = []

    def append(line: str) -> None:
        with errors.naming(path), path.open("a", encoding="utf-8") as file:
            file.write(line)

    if "://" not in str(path):
        yield append
        return
    try:
        yield lines.append
    finally:  # also what there is when a signal ends it
        if lines:
            before = path.read_bytes() if path.exists() else b""
            workdirs.write_atomically(path, before + "".join(lines).encode())


def read_prompts(config: ConfigDict) -> list[Prompt]:
    """What `config.sample` names: the prompts of the command line, then those of the file."""
    c = config.sample
    found = [Prompt(f"config.sample.prompts[{number}]", text) for number, text in enumerate(c.prompts)]
    if c.file.endswith((".jsonl", ".jsonl.gz")):
        records = sources.load((f"jsonl:{c.file}",), "prompts", config.data.skip_bad)
        found += [Prompt(records.origin(i), chats.named(records[i])) for i in range(len(records))]
    elif c.file:
        if not epath.Path(c.file).is_file():
            raise ValueError(f"config.sample.file must exist, got {c.file!r}")
        found += [Prompt(f"{c.file}:{number}", text) for number, text in jsonl.texts(c.file)]
    if c.file and not found:
        raise ValueError(f"config.sample.file must have a prompt, got none in {c.file!r}")
    return found


def make_answer(
    config: ConfigDict, mesh: Mesh, tokenizer: tokenizers.Tokenizer
) -> Callable[[list[Prompt], int], Iterator[dict]]:
    """Loads `config.models.model`; returns (prompts, number of the first) -> `prompt, response, ended` of each.

    A prompt's answer depends on its number and the seed, not on the prompts beside it.
    """
    c = config.sample
    network = networks.build("config.models.model", config.models.model, "lm", mesh, tokenizer, config.seed)
    params = networks.freeze(network)
    limit = network.config.max_length - c.response_length
    sampler = responses.sampler_of(network.config, tokenizer, c, config.seed)

    def encode(prompts: list[Prompt]) -> list[np.ndarray]:
        for prompt in prompts:
            if not schema.is_text(prompt.text):
                raise ValueError(f"{prompt.origin} holds bytes that are no UTF-8, or half of a surrogate pair")
        encoded = tokenizer.encode_prompts([rendered(prompt) for prompt in prompts])
        for prompt, tokens in zip(prompts, encoded, strict=True):
            if not 1 <= len(tokens) <= limit:
                raise ValueError(
                    f"{prompt.origin} must have 1 to {limit} tokens (a context of {network.config.max_length} less "
                    f"config.sample.response_length={c.response_length}), got {len(tokens)}"
                )
        return encoded

    def rendered(prompt: Prompt) -> str | templates.Rendered:
        try:
            return tokenizer.prompt(chats.given(prompt.text))
        except ValueError as error:
            raise ValueError(f"{prompt.origin}: {error}") from None

    def answer(prompts: list[Prompt], first: int) -> Iterator[dict]:
        encoded = encode(prompts)
        width = min(limit, max(SHORTEST, 1 << (max(map(len, encoded)) - 1).bit_length()))
        cuts = padding.cuts(len(prompts), c.batch_size)
        batches = (padding.Batch(range(cut.start, cut.stop), c.batch_size, width) for cut in cuts)
        numbers = range(first, first + len(prompts))
        for batch, found in responses.answer(sampler, params, encoded, numbers, batches, mesh):
            for place, one in zip(batch.places, found, strict=True):
                text = prompts[place].text
                also = {"messages": text.messages} if isinstance(text, chats.Dialogue) else {}
                yield {"prompt": text, **also, "response": one.text, "ended": one.ended}
            process.end_if_stopped()

    return answer


def _typed(dialogue: bool) -> Iterator[str]:
    """Lines from the terminal (or a pipe) until its end; `\\n` in one is a line break. Empty ones only in a dialogue.

    Bytes that are no UTF-8 come as surrogates, which are refused with the prompt that has them.
    """
    if sys.stdin.isatty():
        turns = "One turn a line, an empty line for another dialogue" if dialogue else "One prompt a line"
        print(f"{turns}, \\n for a line break, Ctrl-D to leave.", file=sys.stderr)
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    while True:
        try:
            line = input("prompt> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        line = line.removesuffix("\r")
        if line or dialogue:
            yield line.replace("\\n", "\n")
