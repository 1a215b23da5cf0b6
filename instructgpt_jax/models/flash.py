"""Attention over packed rows by the platform's fused kernel, where scores never reach memory.

* `xla`: attention.attend, plain products and a softmax: the reference, on every platform, for every mask.
* `cudnn`: cuDNN's flash attention on GPUs, through jax.nn.dot_product_attention, in bfloat16. Rows without segments use
  its causal and sliding-window forms, which need no mask in memory. With segments or branches jax.nn has one form only,
  a mask: it becomes a bfloat16 bias (B, 1, T, T), shared by the heads, with a gradient of that shape in the backward
  pass (which nothing reads): 4 T^2 bytes a row, 17 MB at T = 2,048, where the reference holds 4 N T^2 of scores. The
  kernel also has a packed form by offsets, but jax.nn does not expose it.
* `splash`: JAX's Pallas kernel on TPUs, under shard_map: each device attends with its own rows and heads. Blocks of the
  score matrix above the diagonal or outside the window are never computed. No mask exists in memory, only segment ids.

The kernels know columns, not positions. In the rows that data.packing and episodes.pack lay out, each segment is one
run of columns along which positions advance by one, so that within a segment "before" and "fewer than w back" are the
same in columns as in positions, and both say what attention.visible and within_window say. On branches (the completions
of a shared prompt) positions start anew behind the prompt: columns still say what comes before, but not how far back,
so splash serves branches without windows. Padding is a segment of its own here: it sees padding, which keeps every
softmax finite.

Splash compares one id a column, but a completion sees two things, its prompt and itself. So it is told through the
scores: a few more channels of queries and keys take a huge number from the score of a key on another branch, and add an
exact 0 to every other (`branch_channels`). That is one call of the public kernel, with the kernel's own gradient. The
other form, a pass over prompts and one over completions, merged by their log-sum-exps, is two whole passes, and the
public kernel has no gradient through its log-sum-exp: it would need private functions of JAX. The channels are free
where a head leaves room for them in the 128 lanes of a TPU's registers (up to 96 channels). A head of 128 is computed
as 256 wide in 5 of the 9 products of a block, forward and backward: 1.6 times the work of attention, where two passes
take 2.

Letters as in transformer.py.
"""

import functools
import math
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import PartitionSpec as P

from instructgpt_jax.models import attention
from instructgpt_jax.models.attention import Layout
from instructgpt_jax.models.config import ModelConfig
from instructgpt_jax.sharding import BATCH

SAVED_NAME = "flash_attention"  # of what the kernel hands to its backward pass, for remat policies
BRANCH_BITS = 16  # of the numbers of branches
APART = 2.0**30  # taken from the score of a key on another branch: beyond any score, exact in bfloat16
DETERMINISTIC = ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")  # flags of XLA
BLOCK = 512  # rows and columns of the score matrix that splash computes at a time, where T allows

# (query, key, value), each (B, heads, T, H), and `window`, the index of the layer's window among `distinct_windows`.
RowAttention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def saved_by_the_kernel(primitive, *_, **parameters) -> bool:
    """A remat policy: keeps what the kernels hand to their backward passes beside queries, keys and values."""
    name = getattr(primitive, "name", "")
    return name.startswith("dot_product_attention_fwd") or (name == "name" and parameters["name"] == SAVED_NAME)


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': of the mesh in use, which may describe devices that are not here, or of this process."""
    device = _described()
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def device_kind() -> str:
    """What JAX calls the devices of the mesh in use, or of this process: 'TPU v6 lite', 'NVIDIA H200', 'cpu'."""
    return (_described() or jax.devices()[0]).device_kind


def _described():
    """The device that the mesh in use describes, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else getattr(mesh, "abstract_device", None)


def choose(config: ModelConfig, layout: Layout, dropout: bool) -> str:
    """The backend for rows of this layout: config.attention, or with 'auto' the platform's, else `xla` with a word.

    Args:
      dropout: whether attention weights are dropped.

    Raises:
      ValueError: config.attention names a backend that cannot do it.
    """
    backend = config.attention
    if backend == "auto":
        backend = {"gpu": "cudnn", "tpu": "splash"}.get(platform(), "xla")
    if backend == "xla":
        return backend
    obstacle = _obstacle(backend, config, layout, dropout)
    if obstacle is None:
        return backend
    if config.attention != "auto":
        raise ValueError(f"attention must be 'auto' or 'xla' for {obstacle}, got {config.attention!r}")
    _say_once(f"attention: {backend} does not do {obstacle}; xla does it")
    return "xla"


def _obstacle(backend: str, config: ModelConfig, layout: Layout, dropout: bool) -> str | None:
    """What keeps a backend from serving rows of this layout, or None."""
    length = layout.positions.shape[1]
    if dropout:
        return "dropout of attention weights"
    if backend == "splash":
        if layout.branches is not None and any(config.windows):
            return "local windows over completions on branches of a shared prompt"
        if platform() == "gpu":
            return "a GPU"
        if length % 128:
            return f"rows of {length} tokens (splash: multiples of 128)"
    if backend == "cudnn":
        if platform() != "gpu":
            return f"a {platform().upper()}"
        if config.dtype != "bfloat16":
            return f"{config.dtype} (cudnn: bfloat16)"
        if config.head_width % 8 or config.head_width > 128:
            return f"heads of {config.head_width} channels (cudnn: multiples of 8, at most 128)"
        if length % 2:
            return f"rows of {length} tokens (cudnn: even lengths)"
        flags = os.environ.get("XLA_FLAGS", "").split()
        if any(flag + value in flags for flag in DETERMINISTIC for value in ("", "=true", "=1")):
            # XLA ends in an IndexError instead of a kernel (H200, jax 0.11.2, rows with segments).
            return "sums in a fixed order, which XLA_FLAGS ask for"
    return None


@functools.cache
def _say_once(text: str) -> None:
    logging.warning(text)


def distinct_windows(config: ModelConfig) -> tuple[int, ...]:
    """The windows that occur in some layer, each once; 0 = dense."""
    return tuple(sorted(set(config.layer_windows)))


def row_attention(backend: str, config: ModelConfig, layout: Layout) -> RowAttention:
    """Attention of whole rows by a fused kernel, `cudnn` or `splash`."""
    kernel = {"cudnn": _cudnn, "splash": _splash}[backend]
    scale = config.head_width**-0.5 if config.attention_scale is None else config.attention_scale
    windows = distinct_windows(config)

    def attend(query, key, value, window):
        each = [functools.partial(kernel, layout=layout, scale=scale, window=w) for w in windows]
        return each[0](query, key, value) if len(each) == 1 else jax.lax.switch(window, each, query, key, value)

    return attend


def _cudnn(query, key, value, *, layout: Layout, scale: float, window: int) -> jax.Array:
    """(B, N, T, H); see the module for the forms."""
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    run = functools.partial(jax.nn.dot_product_attention, query, key, value, scale=scale, implementation="cudnn")
    if layout.segments is None and layout.branches is None:
        out = run(is_causal=True, local_window_size=(window - 1, 0) if window else None)
    else:
        if layout.segments is not None:
            layout = layout._replace(segments=layout.segments + 1)  # padding sees padding
        mask = attention.visible(layout, layout)
        if window:
            mask &= attention.within_window(layout, layout, jnp.int32(window))
        out = run(mask=mask[:, None], is_causal=True)  # keys in later columns are never seen: half the work
    return out.swapaxes(1, 2)


def _splash(query, key, value, *, layout: Layout, scale: float, window: int) -> jax.Array:
    """(B, N, T, H); rows and heads stay on their devices."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T = query.shape[2]
    block = math.gcd(T, BLOCK)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    interpret = platform() == "cpu"  # slow, for checks

    def local(query, key, value, segments, branches):
        """The rows and heads of one device."""
        mask = masks.LocalMask((T, T), (window - 1, 0), 0) if window else masks.CausalMask((T, T))
        run = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * query.shape[1]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=SAVED_NAME,
            interpret=interpret,
        )
        query = (query * scale).astype(query.dtype)
        if branches is not None:
            of_queries, of_keys = branch_channels(branches)
            query, key = _append(query, of_queries), _append(key, of_keys)
        if segments is None:
            return jax.vmap(run)(query, key, value)
        return jax.vmap(lambda q, k, v, ids: run(q, k, v, segment_ids=splash.SegmentIds(ids, ids)))(
            query, key, value, segments
        )

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(query, key, value, layout.segments, layout.branches)
    heads = P(BATCH, "tensor", None, None)
    ids = [None if x is None else P(BATCH, None) for x in (layout.segments, layout.branches)]
    # The kernel does not say along which axes its results vary, hence no check of that.
    run = jax.shard_map(local, in_specs=(heads, heads, heads, *ids), out_specs=heads, check_vma=False)
    return run(query, key, value, layout.segments, layout.branches)


def branch_channels(branches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Channels of queries and of keys, whose product hides the keys of other branches.

    Every bit of a branch's number has two channels. A query that has a 0 there looks for a 1 in the first, one that has
    a 1 looks for a 0 in the second, so that their product counts the bits in which two numbers differ. Keys of branch 0
    have nothing to find.

    Args:
      branches: (B, T) int32 as in attention.Layout.

    Returns:
      Two (B, T, 2 BRANCH_BITS) float32, of queries (0 or 1) and of keys (0 or -APART). Their product is a sum of zeros
      for keys of branch 0 and of the query's own branch, and -APART or less for others.
    """
    ones = (branches[..., None] >> jnp.arange(BRANCH_BITS)) % 2 == 1
    sought = jnp.concatenate([~ones, ones], axis=-1)
    found = jnp.concatenate([ones, ~ones], axis=-1) & (branches > 0)[..., None]
    return sought.astype(jnp.float32), jnp.where(found, -APART, 0.0)


def _append(x: jax.Array, channels: jax.Array) -> jax.Array:
    """(B, heads, T, H) and (B, T, C) -> (B, heads, T, H + C), in the dtype of x."""
    channels = jnp.broadcast_to(channels[:, None], (*x.shape[:-1], channels.shape[-1]))
    return jnp.concatenate([x, channels.astype(x.dtype)], axis=-1)
