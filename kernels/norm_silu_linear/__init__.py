"""Layer norm and SiLU, a skip connection and its norm, and a linear layer, for few rows."""
