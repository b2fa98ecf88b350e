"""Binary spherical quantization."""
