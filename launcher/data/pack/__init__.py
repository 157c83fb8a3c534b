"""Documents become blocks of one static width."""
