"""Generation: from a trained model to ranked catalogue items, always valid."""
