"""Formats: what opens and writes the bytes of a checkpoint. One file is one format."""
