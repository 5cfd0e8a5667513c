"""Train a text-to-image diffusion transformer from scratch on a micro-budget."""

__version__ = "0.1.0"
