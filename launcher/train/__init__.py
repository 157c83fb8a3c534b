"""The training loop, driven by Accelerate."""
