"""Parts of a forward: hooks, the prefix pass, the suffix engine, generation."""
