"""A trained policy and reward model, exported, against transformers with torch: the same texts, the same scores.

    pip install torch
    python benchmarks/exported.py --policy=runs/e2e/ppo_ptx --reward=runs/e2e/reward --prompts=jsonl:DATA#unique

Of a run whose dialogues were written by the tokenizer's own template: --template=chat.

Both are exported as `configs/export.py` does it. The policy answers the first `--count` prompts greedily here and with
`AutoModelForCausalLM`; the reward model scores these answers here and with `AutoModelForSequenceClassification`. Exits
1 where a text differs or a score lies more than `--tolerance` apart.
"""

import argparse
import importlib.util
import pathlib
import sys
import tempfile

import jax
import transformers

from instructgpt_jax import main as instructgpt
from instructgpt_jax import run_tokenizer, sharding
from instructgpt_jax.data import sources
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.stages import reward_folds, sample

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for configs


def export(init_from: str, folder: str) -> str:
    """Writes a workdir's network in Hugging Face format."""
    from configs import common

    config = common.config("export")
    config.models.model = common.network(init_from=init_from)
    config.export = {"dtype": "float32"}
    instructgpt.run(config, folder)
    return folder


def ours(policy: str, prompts: list[str], length: int, template: str, mesh) -> list[str]:
    """Greedy answers of this program."""
    from configs import common

    config = common.config("sample")
    config.models.model = common.network(init_from=policy)
    config.sample = {"batch_size": 16, "response_length": length, "temperature": 0.0, "top_k": 0, "top_p": 1.0}
    config.data.template = template
    name = run_tokenizer.beside(policy)
    tokenizer = tokenizers.load(name, run_tokenizer.chat_of(config, name))
    answer = sample.make_answer(config, mesh, tokenizer)
    return [found["response"] for found in answer([sample.Prompt("prompt", prompt) for prompt in prompts], 0)]


def prompt_ids(tokenizer, prompt: str, template: str) -> list[int]:
    """A prompt's ids by transformers."""
    if not template:
        return tokenizer(prompt, add_special_tokens=False).input_ids
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]


def theirs(folder: str, prompts: list[str], length: int, template: str) -> list[str]:
    """Greedy answers of transformers."""
    import torch

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    end, found = tokenizer.eos_token_id, []
    for prompt in prompts:
        ids = torch.tensor([prompt_ids(tokenizer, prompt, template)])
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=length,
            eos_token_id=end,
            pad_token_id=end,
        )[0, ids.shape[1] :].tolist()
        found.append(tokenizer.decode(answer[: answer.index(end)] if end in answer else answer))
    return found


def their_scores(folder: str, prompts: list[str], texts: list[str], template: str) -> list[float]:
    """Scores of transformers, each text with its end-of-text token."""
    import torch

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = prompt_ids(tokenizer, prompt, template) + tokenizer(text, add_special_tokens=False).input_ids
        tokens = torch.tensor([[*ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            found.append(model(tokens).logits[0, 0].item() + model.config.reward_bias)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", required=True, help="workdir")
    parser.add_argument("--reward", required=True, help="workdir")
    parser.add_argument("--prompts", required=True, help="a data source")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--response_length", type=int, default=72)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--template", choices=["", "chat"], default="", help="how dialogues were written")
    arguments = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        sys.exit("error: benchmarks/exported.py must have torch to compare with: pip install torch")
    records = sources.load((arguments.prompts,), "prompts", 0)
    prompts = [records[i]["prompt"] for i in range(min(arguments.count, len(records)))]
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    with tempfile.TemporaryDirectory() as folder:
        policy, reward = (export(getattr(arguments, name), f"{folder}/{name}") for name in ("policy", "reward"))
        with jax.set_mesh(mesh):
            texts = ours(arguments.policy, prompts, arguments.response_length, arguments.template, mesh)
            compared = [{"prompt": prompt, "completions": [text]} for prompt, text in zip(prompts, texts, strict=True)]
            model = reward_folds.load(arguments.reward, mesh)
            scores = [found[0] for found in reward_folds.completion_scores(*model, compared, mesh, 256, 4)]
        answers = theirs(policy, prompts, arguments.response_length, arguments.template)
        same = sum(left == right for left, right in zip(texts, answers, strict=True))
        found = their_scores(reward, prompts, texts, arguments.template)
        apart = max(abs(left - right) for left, right in zip(scores, found, strict=True))
    print(f"{same} of {len(prompts)} greedy texts are equal; scores lie at most {apart:.1e} apart")
    sys.exit(same < len(prompts) or apart > arguments.tolerance)


if __name__ == "__main__":
    main()
