"""Files and folders: read strictly, written whole or not at all."""
