"""Checkpoints, deltas and adapters made of a run."""
