"""What doctor knows and tries."""
