"""VQ-Rec: items as the mean of their code vectors, transferable between domains (arXiv 2210.12316)."""
