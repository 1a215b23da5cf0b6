"""The networks: one decoder-only transformer, its heads and its cache; pure functions over plain dicts of parameters."""

from instructgpt_jax.models.config import SIZES, ModelConfig
from instructgpt_jax.models.transformer import (
    Cache,
    cast,
    extend,
    hidden,
    init,
    init_cache,
    logits,
    project,
    scalar,
    scalar_head,
    unembedding,
    unstack,
    with_scalar_head,
)

__all__ = [
    "SIZES",
    "Cache",
    "ModelConfig",
    "cast",
    "extend",
    "hidden",
    "init",
    "init_cache",
    "logits",
    "project",
    "scalar",
    "scalar_head",
    "unembedding",
    "unstack",
    "with_scalar_head",
]
