"""Trains the lab's models over simulated workers."""
