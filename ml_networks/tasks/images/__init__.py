"""Training programs on images."""
