"""From text to token ids, with lookup positions and target spans."""
