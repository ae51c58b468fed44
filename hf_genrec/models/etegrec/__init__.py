"""ETEGRec (arXiv 2409.05546)."""
