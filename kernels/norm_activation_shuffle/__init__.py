"""Everything after a convolution: norm, pixel (un)shuffle, activation, dropout, residual, FiLM."""
