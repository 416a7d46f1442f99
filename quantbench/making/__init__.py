"""Checkpoints that are made here: seeded random weights, and what a GGUF file holds, as safetensors."""
