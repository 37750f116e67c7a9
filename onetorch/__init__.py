"""onetorch: create, run and share optimized PyTorch models."""

__version__ = "0.1.0"
