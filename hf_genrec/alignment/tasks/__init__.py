"""Recommendation tasks as texts: wordings as data, examples filled from interactions, weighted mixtures of families."""
