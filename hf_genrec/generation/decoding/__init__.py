"""Decoding: searches over the trie, and adapters that score codes with stock Hugging Face models."""
