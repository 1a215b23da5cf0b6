"""InstructGPT in JAX: supervised fine-tuning, a K-wise reward model, PPO and PPO-ptx."""

import os

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch is as it should be
