"""Recipes: what a run is asked to do, from the command line to validated sections. Nothing here imports torch."""
