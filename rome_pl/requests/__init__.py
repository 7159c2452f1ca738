"""Edit requests as text: their fields, their files, and conflicts between them."""
