"""Notebook 04: what fits a machine, and which setting to take."""
