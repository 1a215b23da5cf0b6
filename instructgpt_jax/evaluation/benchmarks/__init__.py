"""The paper's public benchmarks as tasks of lm-evaluation-harness (extra `eval`), and what is made of their answers."""
