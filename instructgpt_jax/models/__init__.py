"""The networks: one decoder-only transformer, its heads and its cache; pure functions of plain dicts of parameters."""

from instructgpt_jax.models import adapters, hf, quantised
from instructgpt_jax.models.cache import Cache, extend, init_cache, replay, sampling_params, unstack
from instructgpt_jax.models.config import RUNTIME_FIELDS, SIZES, Adapter, ModelConfig
from instructgpt_jax.models.heads import project, scalar, scalar_head, unembedding, with_scalar_head
from instructgpt_jax.models.sampling import sample
from instructgpt_jax.models.transformer import cast, hidden, init, logits

__all__ = [
    "RUNTIME_FIELDS",
    "SIZES",
    "Adapter",
    "Cache",
    "ModelConfig",
    "adapters",
    "cast",
    "extend",
    "hf",
    "hidden",
    "init",
    "init_cache",
    "logits",
    "project",
    "quantised",
    "replay",
    "sample",
    "sampling_params",
    "scalar",
    "scalar_head",
    "unembedding",
    "unstack",
    "with_scalar_head",
]
