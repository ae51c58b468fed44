"""ActionPiece (arXiv 2502.13581)."""
