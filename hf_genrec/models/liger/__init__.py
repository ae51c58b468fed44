"""LIGER (arXiv 2411.18814)."""
