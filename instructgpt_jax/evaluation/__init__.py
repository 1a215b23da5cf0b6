"""What the evaluation stage is made of: pure functions of texts and numbers, and the programs that make them."""
