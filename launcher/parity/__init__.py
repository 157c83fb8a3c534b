"""mode=parity: the compiled model against stock eager code and against an fp32 reference."""
