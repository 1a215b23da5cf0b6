"""The tokens that end a response: those that a checkpoint, a template and the user name."""

import pathlib

import tokenizers
import transformers

GENERATION = "generation_config.json"  # of a checkpoint; beside a run's tokenizer it has the end tokens alone


def of_checkpoint(name: str) -> list[int]:
    """The ids of the generation_config.json beside a tokenizer, a directory or Hub id; [] where there is none."""
    if pathlib.Path(name).is_dir() and not (pathlib.Path(name) / GENERATION).is_file():
        return []
    try:
        found = transformers.GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:  # a Hub id without the file
        return []
    return found if isinstance(found, list) else [] if found is None else [found]


def settle(
    backend: tokenizers.Tokenizer, wanted: tuple[str, ...], of_template: str, eos: int, found: list[int]
) -> tuple[int, tuple[int, ...]]:
    """The id that texts are trained to end with, and all that end a response, sorted.

    Args:
      wanted: `config.data.end_tokens`.
      of_template: the text of the one that ends the assistant's turn; "" where there is none.
      eos: of the tokenizer.
      found: those of the checkpoint, which hold where none is wanted.

    Raises:
      ValueError: a wanted token that the tokenizer lacks.
    """
    ids = {text: backend.token_to_id(text) for text in wanted}
    if unknown := [text for text, i in ids.items() if i is None]:
        raise ValueError(f"config.data.end_tokens must be tokens of the tokenizer, got {unknown}, which it lacks")
    known = set(backend.get_vocab().values())
    ends = list(ids.values()) or [i for i in found if i in known] or [eos]
    end = backend.token_to_id(of_template) if of_template else eos if eos in ends else ends[0]
    return end, tuple(sorted({end, *ends}))
