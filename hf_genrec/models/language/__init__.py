"""A causal language model over items named by words, with an optional item-level assistant."""
