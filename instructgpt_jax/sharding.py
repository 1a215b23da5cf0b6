"""The device mesh, and where every array lives on it.

One mesh, three axes:

* `data`    rows of the batch; parameters are copies along it,
* `fsdp`    rows of the batch and slices of the parameters (gathered layer by layer when used),
* `tensor`  heads, feed-forward units and vocabulary (Megatron-style tensor parallelism).

Two tables say how a parameter of a given path is laid out: `TRAIN_RULES` shards over fsdp × tensor, `ROLLOUT_RULES`
over tensor only, because sampling reads every weight for every token and cannot afford to gather them each time.

Where the devices are several slices of TPUs (or nodes of GPUs) on a slower network, `slices` says so: `data` goes over
the slices first, `fsdp` and `tensor` stay inside one.
"""

import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that share out the rows of a batch

# Parameter path -> spec. Stacked layers (`blocks/…`) have the layer axis first, which is never sharded: the layers are
# visited one at a time, and each is gathered on its own.
TRAIN_RULES = (
    (r"embed/tokens", P("tensor", "fsdp")),  # (V, D)
    (r"embed/positions", P(None, "fsdp")),  # (T, D)
    (r"embed/project_in", P(None, "fsdp")),  # (E, D)
    (r"embed/project_out", P("fsdp", None)),  # (D, E)
    (r"blocks/attention/(query|key|value)/kernel", P(None, "fsdp", "tensor", None)),  # (L, D, N, H)
    (r"blocks/attention/(query|key|value)/bias", P(None, "tensor", None)),  # (L, N, H)
    (r"blocks/attention/out/kernel", P(None, "tensor", None, "fsdp")),  # (L, N, H, D)
    (r"blocks/mlp/(up|gate)/kernel", P(None, "fsdp", "tensor")),  # (L, D, F)
    (r"blocks/mlp/(up|gate)/bias", P(None, "tensor")),  # (L, F)
    (r"blocks/mlp/down/kernel", P(None, "tensor", "fsdp")),  # (L, F, D)
    (r"blocks/(attention/out|mlp/down)/bias", P()),  # (L, D)
    # Quantised kernels: codes as the kernel, scales as its outputs.
    (r"blocks/attention/(query|key|value)/kernel/codes", P(None, "fsdp", "tensor", None)),  # (L, D, N, H)
    (r"blocks/attention/(query|key|value)/kernel/scale", P(None, None, "tensor", None)),  # (L, 1 or blocks, N, H)
    (r"blocks/attention/out/kernel/codes", P(None, "tensor", None, "fsdp")),  # (L, N, H, D)
    (r"blocks/attention/out/kernel/scale", P(None, None, None, "fsdp")),  # (L, 1 or N, 1 or blocks, D)
    (r"blocks/mlp/(up|gate)/kernel/codes", P(None, "fsdp", "tensor")),  # (L, D, F)
    (r"blocks/mlp/(up|gate)/kernel/scale", P(None, None, "tensor")),  # (L, 1 or blocks, F)
    (r"blocks/mlp/down/kernel/codes", P(None, "tensor", "fsdp")),  # (L, F, D)
    (r"blocks/mlp/down/kernel/scale", P(None, None, "fsdp")),  # (L, 1 or blocks, D)
    # Adapters: as the kernel beside them, but for the rank r.
    (r"blocks/(attention/(query|key|value)|mlp/(up|gate))/adapter/a", P(None, "fsdp", None)),  # (L, D, r)
    (r"blocks/attention/(query|key|value)/adapter/b", P(None, None, "tensor", None)),  # (L, r, N, H)
    (r"blocks/mlp/(up|gate)/adapter/b", P(None, None, "tensor")),  # (L, r, F)
    (r"blocks/attention/out/adapter/a", P(None, "tensor", None, None)),  # (L, N, H, r)
    (r"blocks/mlp/down/adapter/a", P(None, "tensor", None)),  # (L, F, r)
    (r"blocks/(attention/out|mlp/down)/adapter/b", P(None, None, "fsdp")),  # (L, r, D)
    (r"head/kernel", P("tensor", "fsdp")),  # (V, D)
    (r"head/bias", P("tensor")),  # (V,)
    (r"scalar_head/(kernel|bias)", P()),  # (D,) and ()
    (r".*norm[a-z0-9_]*/(scale|bias)", P()),
)


def _without_fsdp(spec: P) -> P:
    return P(*(None if axis == "fsdp" else axis for axis in spec))


ROLLOUT_RULES = tuple((pattern, _without_fsdp(spec)) for pattern, spec in TRAIN_RULES)


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A ('data', 'fsdp', 'tensor') mesh.

    Args:
      shape: sizes of the three axes; one of them may be -1, the rest of the devices. Perhaps `slices`, 1 without it:
        the slices among which `data` is shared out before it goes on inside them.
      devices: the devices to use; all by default.

    Raises:
      ValueError: an unknown or missing axis, more than one -1, sizes that do not multiply to the number of devices, or
        slices that the devices do not have.
    """
    devices = jax.devices() if devices is None else list(devices)
    if set(shape) - {"slices"} != set(AXES):
        raise ValueError(f"config.mesh must have the axes {AXES}, got {tuple(shape)}")
    sizes = [int(shape[axis]) for axis in AXES]
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"config.mesh must have positive sizes and at most one -1, got {dict(shape)}")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
        known = len(devices)
    if known != len(devices):
        raise ValueError(
            f"config.mesh must multiply to the number of devices, {len(devices)}, got {known} of {dict(shape)}"
        )
    groups = _by_slice(devices, int(shape.get("slices", 1)))
    if sizes[0] % len(groups):
        raise ValueError(f"config.mesh.data must be a multiple of config.mesh.slices = {len(groups)}, got {sizes[0]}")
    inside = sizes[0] // len(groups), *sizes[1:]
    arranged = np.concatenate([_arranged(inside, group) for group in groups])
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 3)


def _by_slice(devices: Sequence[jax.Device], count: int) -> list[list[jax.Device]]:
    """The devices of each slice. TPUs know theirs; of others, so many runs of neighbours are taken for slices.

    Raises:
      ValueError: another number of slices than that of the TPUs, or one that does not divide the devices.
    """
    if devices[0].platform == "tpu":
        found: dict[int, list[jax.Device]] = {}
        for device in devices:
            found.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
        if len(found) != count:
            raise ValueError(f"config.mesh.slices must be {len(found)}, the slices of these TPUs, got {count}")
        return [found[index] for index in sorted(found)]
    if count < 1 or len(devices) % count:
        raise ValueError(f"config.mesh.slices must divide the number of devices, {len(devices)}, got {count}")
    size = len(devices) // count
    return [list(devices[n * size : (n + 1) * size]) for n in range(count)]


def _arranged(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of a slice in the shape of a mesh, neighbours on its axes near each other."""
    try:
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices).devices
    except NotImplementedError:  # an axis of the torus must be cut: fsdp = 8 on 4 x 4 x 4 chips
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def batch_shards(mesh: Mesh) -> int:
    """How many ways the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def path_name(path: tuple) -> str:
    """`blocks/mlp/up/kernel`, from the key path of a pytree of nested dicts."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def spec_for(path: str, rules: Sequence[tuple[str, P]]) -> P:
    """The spec of the first rule that matches the whole of `path`."""
    for pattern, spec in rules:
        if re.fullmatch(pattern, path):
            return spec
    raise ValueError(f"no sharding rule for the parameter {path!r}")


def param_shardings(mesh: Mesh, params, rules: Sequence[tuple[str, P]] = TRAIN_RULES):
    """A tree of NamedSharding beside a tree of parameters (arrays or ShapeDtypeStructs).

    Raises:
      ValueError: a dimension that its mesh axis does not divide; names the parameter and both numbers.
    """

    def sharding(path, leaf):
        name = path_name(path)
        spec = spec_for(name, rules)
        for dimension, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and dimension % mesh.shape[axis]:
                raise ValueError(
                    f"config.mesh.{axis}={mesh.shape[axis]} must divide every dimension it shards, got {dimension} in "
                    f"{name} {tuple(leaf.shape)}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, params)


def constrain(x: jax.Array, *spec) -> jax.Array:
    """Pins the layout of an intermediate array under the mesh of `jax.set_mesh`; does nothing without one.

    Raises:
      ValueError: a dimension that its mesh axes do not divide; names both numbers.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    for dimension, axes in zip(x.shape, spec, strict=False):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        shards = math.prod(mesh.shape[axis] for axis in axes)
        if dimension % shards:
            name = " × ".join(f"config.mesh.{axis}" for axis in axes)
            raise ValueError(f"{name} = {shards} must divide every dimension it shards, got {dimension} in {x.shape}")
    return jax.lax.with_sharding_constraint(x, P(*spec))


def constrain_params(params, rules: Sequence[tuple[str, P]]):
    """Lays a tree of parameters out by a rule table under the mesh of `jax.set_mesh`; does nothing without one."""
    if jax.sharding.get_abstract_mesh().empty:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.lax.with_sharding_constraint(x, spec_for(path_name(path), rules)), params
    )
