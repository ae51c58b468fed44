"""EAGER (arXiv 2406.14017)."""
