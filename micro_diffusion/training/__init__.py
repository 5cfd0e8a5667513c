"""The training loop, its stages, and what it saves."""
