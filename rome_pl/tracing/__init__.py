"""Causal tracing: where a model keeps a fact."""
