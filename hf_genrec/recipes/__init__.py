"""Recipes: one YAML file per published system, the resolver and the pipeline that runs them."""
