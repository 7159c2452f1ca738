"""What a user asks for, as text: requests, the files they come from, how they conflict."""
