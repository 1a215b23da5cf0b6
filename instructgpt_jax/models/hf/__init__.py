"""Checkpoints in Hugging Face format: in, straight into the shards of a mesh, and out, for any tool that reads them.

A family is one table (families.py). `load` and `save` know no family: they follow the table's names and layouts.
"""

from instructgpt_jax.models.hf.exporting import check_directory, save, save_adapter
from instructgpt_jax.models.hf.families import FAMILIES, family_of
from instructgpt_jax.models.hf.loading import load, read_config, read_generation, version

__all__ = [
    "FAMILIES", "check_directory", "family_of", "load", "read_config", "read_generation", "save", "save_adapter",
    "version",
]  # fmt: skip
