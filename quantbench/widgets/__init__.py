"""The sweep behind buttons."""
