"""The reducer: one compressed averaging of all gradients of a model, and the figures
about it.
"""
