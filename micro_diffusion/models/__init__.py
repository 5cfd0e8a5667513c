"""What is trained (the transformer) and what is loaded (autoencoder, text encoder)."""
