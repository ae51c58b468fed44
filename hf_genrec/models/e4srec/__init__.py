"""E4SRec: a language model as an encoder of item vectors, between two linear maps."""
