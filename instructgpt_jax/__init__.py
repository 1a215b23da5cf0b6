"""InstructGPT in JAX: supervised fine-tuning, a K-wise reward model, PPO and PPO-ptx."""
