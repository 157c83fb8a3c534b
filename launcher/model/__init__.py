"""The model that is trained: loading, LoRA, attention, the forward pass over packed blocks."""
