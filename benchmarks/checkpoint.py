"""A checkpoint in Hugging Face format here and in transformers with torch: logits, loss, continuations, and an export.

    pip install torch
    python benchmarks/checkpoint.py --model=models/smollm2 --text=page.txt

On the first `--tokens` tokens of the text: the greatest difference of two logits, and the mean loss. The first
`--count` paragraphs, cut after `--prompt` tokens, are continued greedily by `--length` tokens, whatever ends a text.
Then the checkpoint is exported, opened by transformers and continues the same prompts. All in float32 on the CPU.
Exits 1 where logits lie more than 1e-3 apart, losses more than 1e-4, or a token differs.
"""

import argparse
import importlib.util
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from instructgpt_jax import models, rollout
from instructgpt_jax.models import hf

LOGITS, LOSS = 1e-3, 1e-4  # the greatest differences


def ours(directory: str, page: np.ndarray, prompts: list[np.ndarray], length: int) -> tuple:
    """Logits (T, V) of the page, and the continuations (prompts, length) of this program."""
    config, params = hf.load(directory)
    logits = jax.jit(lambda params, tokens: models.logits(config, params, tokens))(params, page[None])[0]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    rows = np.stack([np.pad(prompt, (0, max(lengths) - len(prompt))) for prompt in prompts]).astype(np.int32)
    generate = jax.jit(lambda params: rollout.generate(config, params, rows, lengths, length, 0, temperature=0.0))
    sampled = generate(params)
    return np.asarray(logits), np.asarray(sampled.tokens), config, params


def theirs(directory: str, page: np.ndarray, prompts: list[np.ndarray], length: int) -> tuple:
    """The same of transformers."""
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        logits = model(torch.tensor(page)[None].long()).logits[0].numpy()
        found = np.zeros((len(prompts), length), np.int64)
        for size in {len(prompt) for prompt in prompts}:  # without padding, which would be one more thing to compare
            here = [row for row, prompt in enumerate(prompts) if len(prompt) == size]
            ids = torch.tensor(np.stack([prompts[row] for row in here])).long()
            mask = torch.ones_like(ids)
            answers = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=length, pad_token_id=0)
            found[here] = answers[:, size:].numpy()
    return logits, found


def mean_loss(logits: np.ndarray, page: np.ndarray) -> float:
    """Of each token given those before it."""
    logprobs = jax.nn.log_softmax(jnp.asarray(logits[:-1], jnp.float32))
    return -float(jnp.mean(jnp.take_along_axis(logprobs, page[1:, None], axis=-1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory in Hugging Face format, with its tokenizer")
    parser.add_argument("--text", required=True, type=pathlib.Path, help="a file of plain text, some paragraphs")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    arguments = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        sys.exit("error: benchmarks/checkpoint.py must have torch to compare with: pip install torch")
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    encode = lambda text: np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32)  # noqa: E731
    text = arguments.text.read_text(encoding="utf-8")
    page = encode(text)[: arguments.tokens]
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    prompts = [encode(part)[: arguments.prompt] for part in paragraphs[: arguments.count]]
    if len(page) < arguments.tokens or len(prompts) < arguments.count:
        sys.exit(
            f"error: --text must have {arguments.tokens} tokens and {arguments.count} paragraphs, got {len(page)} and "
            f"{len(prompts)}"
        )
    logits, tokens, config, params = ours(arguments.model, page, prompts, arguments.length)
    reference, expected = theirs(arguments.model, page, prompts, arguments.length)
    with tempfile.TemporaryDirectory() as folder:
        hf.save(folder, config, params, tokenizer, generation=hf.read_generation(arguments.model))
        opened = transformers.AutoTokenizer.from_pretrained(folder)
        exported, again = theirs(folder, page, prompts, arguments.length)
        same_texts = opened.batch_decode(again) == tokenizer.batch_decode(tokens)
    apart = float(np.max(np.abs(logits - reference)))
    losses = mean_loss(logits, page), mean_loss(reference, page)
    same = int(np.sum(np.all(tokens == expected, axis=1)))
    print(f"logits of {len(page)} tokens: at most {apart:.2e} apart, of up to {np.max(np.abs(reference)):.1f}")
    print(f"mean loss: {losses[0]:.6f} here, {losses[1]:.6f} there")
    print(f"greedy continuations of {arguments.length} tokens: {same} of {len(prompts)} are the same")
    exact = np.array_equal(exported, reference)
    same_or = lambda same: "the same" if same else "others"  # noqa: E731
    print(f"exported, there again: bits of the logits {same_or(exact)}, texts {same_or(same_texts)}")
    if apart > LOGITS or abs(losses[0] - losses[1]) > LOSS or same < len(prompts) or not (same_texts and exact):
        sys.exit(1)


if __name__ == "__main__":
    main()
