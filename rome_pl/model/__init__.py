"""Loading a language model, and finding the modules that an edit rewrites."""
