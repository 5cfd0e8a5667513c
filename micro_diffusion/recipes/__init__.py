"""Whole training runs as values."""
