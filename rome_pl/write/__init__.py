"""The closed form, and the weights it is written into."""
