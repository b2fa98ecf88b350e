"""Layer norm, SiLU, skip connection and layer norm over the last axis."""
