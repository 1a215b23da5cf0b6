"""The paper's public benchmarks (section 4.2, appendices D and E), by lm-evaluation-harness on our own networks."""
