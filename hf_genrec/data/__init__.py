"""Data: readers, interactions, items, sequences, splits and collators. Arrow and numpy, no loop over rows."""
