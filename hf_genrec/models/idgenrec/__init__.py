"""IDGenRec (arXiv 2403.19021)."""
