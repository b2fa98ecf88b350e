"""A small network of its own for every neuron, over its recent past."""
