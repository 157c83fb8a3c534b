"""Sources become rows: one module for each kind of file, one for the formats of their columns."""
