"""Recipes: typed sections (schema), layering and validation (load), and how they are shown (show). Never torch."""
