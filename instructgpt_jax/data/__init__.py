"""From raw prompts and human labels to packed rows."""
