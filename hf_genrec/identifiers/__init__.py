"""CREATION: quantizers, collisions and item tokenizers."""
