"""Loading a language model, and finding in it what an edit rewrites."""
