"""What reads the last hidden states: the unembedding of a language model, and the scalar head of rewards and values."""

import jax
import jax.numpy as jnp

from instructgpt_jax.models.config import ModelConfig


def unembedding(config: ModelConfig, params: dict) -> tuple[jax.Array, jax.Array | None]:
    """The output matrix (padded V, D) in the compute dtype, and its bias (padded V,) float32 or None."""
    head = params.get("head", {})
    kernel = head["kernel"] if "kernel" in head else params["embed"]["tokens"]
    return kernel.astype(config.dtype), head.get("bias")


def project(config: ModelConfig, params: dict, x: jax.Array) -> jax.Array:
    """Logits (…, V) float32 of hidden states (…, D)."""
    kernel, bias = unembedding(config, params)
    y = jnp.einsum("...d,vd->...v", x, kernel, preferred_element_type=jnp.float32)
    return (y if bias is None else y + bias)[..., : config.vocab_size]


def scalar(config: ModelConfig, params: dict, x: jax.Array) -> jax.Array:
    """The scalar head (…,) float32 of hidden states (…, D): a value a token, or the score where a sequence ends."""
    head = params["scalar_head"]
    return jnp.einsum("...d,d->...", x.astype(jnp.float32), head["kernel"].astype(jnp.float32)) + head["bias"]


def scalar_head(config: ModelConfig, key: jax.Array) -> dict:
    """A fresh projection to one scalar: kernel (D,) of std 1/sqrt(D+1), bias () 0."""
    width = config.embedding_width
    return {"kernel": jax.random.normal(key, (width,)) / (width + 1) ** 0.5, "bias": jnp.zeros(())}


def with_scalar_head(config: ModelConfig, params: dict, key: jax.Array) -> tuple[ModelConfig, dict]:
    """The same body with the unembedding replaced by a fresh scalar head (paper, section 3.5 and appendix C)."""
    body = {name: tree for name, tree in params.items() if name not in ("head", "scalar_head")}
    return config.replace(head="scalar"), body | {"scalar_head": scalar_head(config, key)}
