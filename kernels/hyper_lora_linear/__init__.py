"""A linear layer plus a low-rank update that each row generates from its own context."""
