"""Synchronisation of pairs of neurons over time."""
