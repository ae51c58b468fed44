"""A language model that re-ranks a retriever's candidates, with optional soft tokens."""
