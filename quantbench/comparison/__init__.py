"""Notebook 05: machines and versions side by side, and the student's T4 table."""
