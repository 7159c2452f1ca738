"""The LightningModules and what they are made of."""
