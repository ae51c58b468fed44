"""SASRec (arXiv 1808.09781)."""
