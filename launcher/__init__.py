"""Compiled QLoRA fine-tuning: recipe in, verified compiled run, reloadable adapter out."""

__version__ = "0.1.0"
