"""ColaRec (arXiv 2403.18480)."""
