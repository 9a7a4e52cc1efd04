"""Checkpoints on disk: tensors, layout, side files, identity and safe replacement, without torch."""
