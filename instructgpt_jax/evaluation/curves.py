"""What training wrote down: the lines of a workdir's metrics.jsonl as one curve a metric."""

import math

from etils import epath

from instructgpt_jax.training import metrics


def read(workdir: epath.PathLike) -> dict[str, list[list[float]]]:
    """metric -> [[step, value], …] in the order of the steps, without `perf/*` and values that are not finite.

    Raises:
      ValueError: no metrics.jsonl there, or a damaged one.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"config.evaluate.curves must name workdirs of finished stages, found no {path}")
    found: dict[str, list[list[float]]] = {}
    for line in metrics.read_lines(path):
        for key, value in line.items():
            if key != "step" and not key.startswith("perf/") and value is not None and math.isfinite(value):
                found.setdefault(key, []).append([line["step"], value])
    return {key: found[key] for key in sorted(found)}
