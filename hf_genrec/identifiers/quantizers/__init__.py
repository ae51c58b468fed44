"""Quantizers: item vectors to codes."""
