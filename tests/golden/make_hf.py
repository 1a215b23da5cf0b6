"""Writes the golden checkpoints under tests/golden/hf: a tiny random model of each family, and its logits by torch.

    python tests/golden/make_hf.py

They keep the exchange of checkpoints tested where torch is not installed. llama is bfloat16, in several files with an
index.
"""

import pathlib
import shutil
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import hf_checkpoints

FAMILIES = ("gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3")
SMALL = {"n_embd": 16, "hidden_size": 16, "intermediate_size": 24, "ffn_dim": 24, "vocab_size": 40}
SMALL |= {"n_positions": 24, "max_position_embeddings": 24}


def main():
    import torch
    import transformers

    shutil.rmtree(HERE / "hf", ignore_errors=True)
    for case in FAMILIES:
        options = hf_checkpoints.CASES[case][1]
        changes = {key: value for key, value in SMALL.items() if options.get(key) is not None}
        if case == "gpt_neox":
            changes["rope_parameters"] = {"rope_theta": 100.0, "partial_rotary_factor": 0.5}
        model = hf_checkpoints.build(case, seed=1, **changes)
        folder = HERE / "hf" / case
        if case == "llama":
            model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="8KB")
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        else:
            model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        tokens = np.random.default_rng(2).integers(0, SMALL["vocab_size"], (2, 16))
        with torch.no_grad():
            logits = model(torch.tensor(tokens)).logits.numpy()
        np.savez(folder / "expected.npz", tokens=tokens.astype(np.int32), logits=logits)


if __name__ == "__main__":
    main()
