"""Reads sources into rows: one module per kind of source, and formats.py for the columns of their rows."""
