"""Notebook 02: what each setting does to the text, token by token against a reference."""
