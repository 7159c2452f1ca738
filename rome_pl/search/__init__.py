"""The search for the value of an edit."""
