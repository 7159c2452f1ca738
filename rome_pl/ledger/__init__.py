"""The record of a run's edits, and rebuilding weights from it."""
