"""Trainers: thin subclasses of transformers' Trainer."""
