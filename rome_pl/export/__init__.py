"""Checkpoints, deltas and adapters of a run."""
