"""The room in which requests, searches, writes and records meet."""
