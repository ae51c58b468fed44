"""LLaDA-Rec (arXiv 2511.06254)."""
