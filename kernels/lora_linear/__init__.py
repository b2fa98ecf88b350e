"""A linear layer plus a low-rank, gated update."""
