"""A third op, outside the package: proof that adding one needs no change to ``core``."""
