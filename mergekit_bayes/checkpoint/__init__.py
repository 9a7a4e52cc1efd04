"""Checkpoints on disk, without torch: tensors, layout, side files, content hashes, replacement."""
