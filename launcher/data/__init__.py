"""From the sources a recipe names to packed rows of one static shape: read, render, mask, pack, serve."""
