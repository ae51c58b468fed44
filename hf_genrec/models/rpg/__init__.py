"""RPG: long unordered semantic IDs, all digits predicted at once (arXiv 2506.05781)."""
