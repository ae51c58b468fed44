"""P5 (arXiv 2203.13366): T5 over texts with item names, all tokens of one word marked by one shared embedding."""
