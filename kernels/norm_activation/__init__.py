"""Norm, activation, dropout and residual over the last axis."""
