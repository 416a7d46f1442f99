"""Many cells, measured in rounds: each model and setting in a process of its own, and every failure a row."""
