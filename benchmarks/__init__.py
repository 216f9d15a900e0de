"""Measurements of the library; each is run from the checkout by its name."""
