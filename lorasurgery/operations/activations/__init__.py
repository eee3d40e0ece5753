"""What modules get and give while the base runs on a text, and what of a change that makes count."""
