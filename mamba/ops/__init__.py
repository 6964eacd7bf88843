"""Fast operators, each beside its slow twin with the same signature."""
