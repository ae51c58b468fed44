"""PSRQ's ranking network: cross-attention between modal-joint and modal-specific codes (arXiv 2508.20359)."""
