"""Frozen kernels in 8 or 4 bits: what an adapter can stand on (QLoRA, Dettmers et al. 2023).

In place of its kernel, a projection has `kernel/{codes, scale}`, stacked over the layers as the kernel is. Embeddings,
norms, biases and heads stay as they are. A layer's kernels are made of them where the layer is computed, forwards and
backwards: one layer at a time is there in full.

  int8  codes -127 … 127, a scale for each output channel: kernel = code * scale
  nf4   16 levels, the quantiles of a normal distribution, two codes a byte; a scale for each block of 64 inputs of an
        output channel: kernel = level[code] * scale

qwix makes the codes and scales (extra `qwix`). Kernels are made of them here: qwix looks levels up one by one in a
flattened array, which no sharding survives, and which compilers do not fuse into the product.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

FORMATS = ("int8", "nf4")
BLOCK = 64  # inputs that share a scale of nf4, at most: QLoRA's
INPUTS = {"out": (0, 1)}  # axes of a kernel that are summed over; of every other projection the first
# Levels of NF4 (Dettmers et al. 2023, appendix E).
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def check(key: str, form: str) -> None:
    """Refuses a format where it cannot be had: without qwix, or on a device whose compiler has no such numbers.

    Args:
      key: that asks for it, for the error.
    """
    try:
        import qwix  # noqa: F401
    except ImportError:
        raise ValueError(f"{key} must be '' without qwix, got {form!r}: pip install 'instructgpt-jax[qwix]'") from None
    try:
        kernel = jnp.ones((1, 2, 2))
        jax.block_until_ready(jax.jit(lambda x: plain(_stored("up", x, form), "float32"))(kernel))
    except Exception as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"{key} must be '' on {jax.default_backend()}, which has no {form}: {said}") from error


def store(params: dict, form: str) -> dict:
    """Parameters, perhaps with adapters, with the kernels of all projections in a format.

    Args:
      params: kernels in float32, or already in a format: those of the same one stay as they are.
      form: one of FORMATS.
    """

    def one(name, tree):
        if not isinstance(tree, dict):
            return tree
        found = {part: one(part, inside) for part, inside in tree.items() if part != "kernel"}
        if "kernel" in tree:
            kernel = tree["kernel"]
            same = isinstance(kernel, dict) and _format(kernel) == form
            found["kernel"] = kernel if same else _stored(name, plain(kernel, "float32"), form)
        return found

    return params | {"blocks": one("blocks", params["blocks"])}


def _stored(name: str, kernel: jax.Array, form: str) -> dict:
    """{codes, scale} of the kernels (L, in, out) of a projection, layer by layer."""
    import qwix

    inputs = INPUTS.get(name, (0,))
    channels = [axis for axis in range(kernel.ndim - 1) if axis not in inputs]
    tiles = {}
    if form == "nf4":
        size = kernel.shape[1 + inputs[-1]]
        tiles = {inputs[-1]: next(block for block in range(min(BLOCK, size), 0, -1) if size % block == 0)}
        channels += inputs[:-1]

    # qwix has the largest value of a channel half way between the codes 127 and 128, where rounding decides.
    scaled = "absmax" if form == "nf4" else f"absmax,{127.5 / 127}"

    def one(kernel):
        made = qwix.quantize(kernel, form, channelwise_axes=channels, tiled_axes=tiles, calibration_method=scaled)
        return {"codes": made.qvalue, "scale": made.scale}

    return jax.lax.map(one, kernel.astype(jnp.float32))


def _format(kernel: dict) -> str:
    return "nf4" if kernel["codes"].dtype == jnp.uint4 else "int8"


def plain(tree, dtype: str, after: jax.Array | None = None):
    """A tree with kernels in `dtype` in place of codes and scales; one without any is given back as it is.

    Args:
      after: what is there before kernels are made. Of sampling, whose weights stay the same from token to token, a
        compiler would else make all kernels once and keep them.
    """
    if not isinstance(tree, dict):
        return tree
    if "codes" not in tree:
        return {name: plain(part, dtype, after) for name, part in tree.items()}
    codes, scale = tree["codes"], tree["scale"]
    if after is not None:
        codes, scale, _ = jax.lax.optimization_barrier((codes, scale, after))
    for axis, (all_of_it, blocks) in enumerate(zip(codes.shape, scale.shape, strict=True)):
        if blocks not in (1, all_of_it):
            scale = jnp.repeat(scale, all_of_it // blocks, axis, total_repeat_length=all_of_it)
    if _format(tree) == "int8":
        values = codes.astype(jnp.float32)
    else:
        codes, values = codes.astype(jnp.int32), jnp.float32(LEVELS[0])
        for code, level in enumerate(LEVELS[1:], 1):  # what a compiler can fuse
            values = jnp.where(codes == code, np.float32(level), values)
    return (values * scale).astype(dtype)


def found(params: dict) -> bool:
    """Whether the kernels of a network are in a format."""
    return isinstance(params["blocks"]["attention"]["query"]["kernel"], dict)


def abstract(params: dict, form: str) -> dict:
    """Shapes of `store`, of shapes."""
    return jax.eval_shape(functools.partial(store, form=form), params)
