"""Notebook 03: what this machine could do at most, where the time and the bytes of a setting go, and the verdict."""
