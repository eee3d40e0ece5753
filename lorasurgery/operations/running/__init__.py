"""A model in the runtime that it is for."""
