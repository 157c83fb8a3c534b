"""The model that is trained: loading, LoRA, attention, the packed forward."""
