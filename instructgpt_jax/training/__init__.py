"""State, optimiser, loop, checkpoints and metrics, the same for every stage."""
