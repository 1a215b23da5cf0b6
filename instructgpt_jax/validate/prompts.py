"""What `config.prompts` must be, and what its keys need of each other."""

from ml_collections import ConfigDict

from instructgpt_jax.data import sources
from instructgpt_jax.validate.rules import EXAMPLE, SHARE, TEXT, TEXTS, integer

RULES = {
    "prefix_chars": integer(1), "max_per_user": integer(1), "split_key": TEXT, "valid_share": SHARE,
    "test_share": SHARE, "max_tokens": integer(1), "language_sample": integer(1), "few_shot": TEXTS,
    "example": EXAMPLE, "shots": integer(0), "shot_sets": integer(1),
}  # fmt: skip


def check_prompts(config: ConfigDict) -> None:
    """The splits leave a training share, a tokenizer counts, and sets of shots can differ.

    Raises:
      ValueError: names the key, what it must be and what it is.
    """
    c = config.prompts
    if not config.data.tokenizer:
        raise ValueError("config.data.tokenizer must be set: it counts the tokens of prompts, got ''")
    if c.valid_share + c.test_share >= 1:
        raise ValueError(
            f"config.prompts.valid_share + test_share must be below 1, got {c.valid_share} + {c.test_share}"
        )
    if c.shot_sets > 1 and not c.shots:
        raise ValueError(
            f"config.prompts.shots must be at least 1 with several sets of shots, got 0 and shot_sets={c.shot_sets}"
        )
    for source in c.few_shot:
        try:
            sources.parse(source)
        except ValueError as error:
            raise ValueError(f"config.prompts.few_shot: {error}") from None
