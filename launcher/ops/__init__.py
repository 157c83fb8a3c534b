"""Operations of the training step, each beside its plain reference. Imports torch and triton only."""
