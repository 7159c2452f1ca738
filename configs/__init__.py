"""Shipped run configurations; ``rome-pl edit --config NAME`` finds them by name."""
