"""Ours is found before the package of that name that torch-fidelity installs."""
