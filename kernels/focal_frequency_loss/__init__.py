"""The focal frequency loss of images."""
