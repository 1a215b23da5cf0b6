"""What a run has left in its workdir."""

import json

import jax
import numpy as np

from instructgpt_jax.training import checkpoint


def lines(workdir, name="metrics.jsonl"):
    """The lines of a log without what depends on the clock; none before it exists."""
    path = workdir / name
    rows = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{key: value for key, value in json.loads(row).items() if not key.startswith("perf/")} for row in rows]


def arrays(workdir, which=""):
    """Every array of the newest checkpoint or of a part of it, optimiser included."""
    device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    shapes = checkpoint.read_shapes(workdir, which)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    return jax.tree.map(np.asarray, checkpoint.load_params(workdir, abstract, which=which))
