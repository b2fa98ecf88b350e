"""A multi-layer perceptron of narrow layers in one kernel."""
