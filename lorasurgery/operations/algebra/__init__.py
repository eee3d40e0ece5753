"""Arithmetic on whole adapters: changes as factors, their SVD, the nearest of a rank, and how a result is written."""
