"""The harness's own `hf` model under torch and ours on one checkpoint: log-likelihoods, metrics, time.

    python benchmarks/lm_eval_peer.py MODEL DATA [--limit=100] [--tasks=hellaswag,rte] [--batch_size=1,8,32]

MODEL is a directory in Hugging Face format, DATA a folder of benchmark files (docs/benchmarks.md). Both models answer
the same documents in one process, in float32: for each task a line with the largest difference of a log-likelihood,
for how many endings both say alike whether greedy decoding gives them, and both metrics; of a task that generates, how
many texts are the same. `hf` is timed at each batch size; its best one stands beside ours, which answers twice: the
first time compiles. Needs torch and the extra `eval`. Exits 1 where a log-likelihood differs by more than 1e-3, or a
metric at all where the texts are the same.
"""

import argparse
import importlib.util
import sys
import time

import jax

from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.evaluation.benchmarks import catalog
from instructgpt_jax.models import hf
from instructgpt_jax.sharding import make_mesh

PACKAGES = ("lm_eval", "torch", "accelerate")
TASKS = "hellaswag,rte,sst2,wsc,truthfulqa_mc1,truthfulqa_mc2,crows_pairs_english"


def ask(lm, task: str, data: str, limit: int) -> tuple[dict, float]:
    """A task's results, and the seconds that they took."""
    tasks = catalog.load([task], data)
    if tasks[task].get_config("num_fewshot") is None:
        tasks[task].set_config(key="num_fewshot", value=0)
    import lm_eval

    started = time.perf_counter()
    found = lm_eval.evaluate(lm, {"tasks": tasks, "groups": {}}, limit=limit, bootstrap_iters=0)
    return found, time.perf_counter() - started


def answers(found: dict, task: str) -> list[tuple[float, bool]] | list[str]:
    return [answer[0] for sample in found["samples"][task] for answer in sample["resps"]]


def numbers(found: dict, task: str) -> dict[str, float]:
    return {key.removesuffix(",none"): x for key, x in found["results"][task].items() if isinstance(x, float)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--limit", type=int, default=100, help="documents of a task")
    parser.add_argument("--tasks", default=TASKS, help="names, divided by commas")
    parser.add_argument("--batch_size", default="8", help="of hf; of several the fastest counts")
    parser.add_argument("--row_length", type=int, default=256, help="of our packed rows")
    parser.add_argument("--rows", type=int, default=8, help="of ours that go through the network at once")
    args = parser.parse_args()
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"error: benchmarks/lm_eval_peer.py must have {', '.join(missing)}: pip install {' '.join(missing)}")
    from lm_eval.models.huggingface import HFLM

    from instructgpt_jax.evaluation.benchmarks import adapter

    mesh = make_mesh(dict(data=1, fsdp=-1, tensor=1))
    network, params = hf.load(args.model, mesh)
    options = adapter.Options(args.row_length, args.rows, 32)
    ours = adapter.PolicyLM(network, params, tokenizers.load(args.model), mesh, options, seed=0)
    theirs = HFLM(args.model, device="cpu" if jax.default_backend() == "cpu" else "cuda", dtype="float32")
    worst = 0.0
    same = True
    for task in args.tasks.split(","):
        first, compiling = ask(ours, task, args.data, args.limit)
        again, seconds = ask(ours, task, args.data, args.limit)
        timed = {}
        for size in map(int, args.batch_size.split(",")):
            theirs.batch_size_per_gpu = size
            found, timed[size] = ask(theirs, task, args.data, args.limit)
        pairs = list(zip(answers(found, task), answers(again, task), strict=True))
        mine, his = numbers(again, task), numbers(found, task)
        best = min(timed, key=timed.get)
        if isinstance(pairs[0][0], str):
            alike = sum(a == b for a, b in pairs)
            said = f"{alike} of {len(pairs)} texts the same"
            comparable = alike == len(pairs)
        else:
            apart, comparable = max(abs(a[0] - b[0]) for a, b in pairs), True
            greedy, worst = sum(a[1] == b[1] for a, b in pairs), max(worst, apart)
            said = f"{len(pairs)} endings, log-likelihoods at most {apart:.1e} apart, greedy alike {greedy}"
        bounds = {key: 1e-3 if "likelihood" in key or "mc2" in task else 1e-9 for key in his}
        same &= not comparable or all(abs(mine[key] - his[key]) < bounds[key] for key in his)
        said += "; " + ", ".join(f"{key} {his[key]:.4f} and {mine[key]:.4f}" for key in his)
        print(
            f"{task}: {said} (hf, ours); {timed[best]:.1f} s by hf at batch size {best}, {seconds:.1f} s by ours "
            f"({compiling:.1f} s with compiling): {timed[best] / seconds:.1f} times as fast",
            flush=True,
        )
    return int(worst > 1e-3 or not same)


if __name__ == "__main__":
    sys.exit(main())
