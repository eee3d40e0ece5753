"""What merge is made of: options, the work on each tensor, quantizing again."""
