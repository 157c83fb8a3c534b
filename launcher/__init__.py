"""Compiled QLoRA fine-tuning: recipe in, verified compiled run, reloadable adapter out."""
