"""The paper's public benchmarks (section 4.2, appendices D and E): tasks of lm-evaluation-harness (extra `eval`), our
networks as its model, and what is made of their answers."""
