"""ALIGNMENT: trainers that tie identifiers to language and behaviour."""
