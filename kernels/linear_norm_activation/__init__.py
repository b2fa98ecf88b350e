"""A linear layer with norm, activation, dropout and residual."""
