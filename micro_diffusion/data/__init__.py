"""Images and captions: sources, the latent store, and the loader that reads it."""
