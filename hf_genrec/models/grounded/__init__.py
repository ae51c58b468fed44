"""BIGRec: a language model writes a title, its own embedding of it finds the item."""
