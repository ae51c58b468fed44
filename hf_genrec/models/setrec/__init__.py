"""SETRec: items as sets of continuous tokens, found by queries all at once (arXiv 2502.10833)."""
