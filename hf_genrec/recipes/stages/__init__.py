"""The stages a recipe names: feature blocks, identifiers, training methods; the values of the lines in `components`."""
