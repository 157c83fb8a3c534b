"""The process: its rank, its signals, its environment and its caches. Knows no model."""
