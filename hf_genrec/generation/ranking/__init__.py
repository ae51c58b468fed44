"""Ranking a few candidates with a chat model that was never trained for it: prompts, answers, bootstrapping, clients."""
