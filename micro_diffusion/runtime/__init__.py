"""Ranks, seeds, devices, logs, atomic files and reports: what every floor stands on."""
