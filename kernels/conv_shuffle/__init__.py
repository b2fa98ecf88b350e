"""A convolution with activation and pixel (un)shuffle, with weights of its own for each sample."""
