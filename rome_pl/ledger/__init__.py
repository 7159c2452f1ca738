"""The record of a run's edits, and what can be rebuilt from it."""
