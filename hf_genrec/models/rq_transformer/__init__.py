"""RQ-Transformer recommender (arXiv 2203.01941, 2508.14910)."""
