"""The one training step, for any number of slots at once; optimizer, checkpoints, interruption."""
