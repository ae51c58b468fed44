"""SpecGR (arXiv 2410.02939)."""
