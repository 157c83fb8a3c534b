"""Rows become token ids, with a mask of the tokens that the loss sees."""
