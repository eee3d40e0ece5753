"""Kernels: each with its definition in torch, a CPU path and a Triton path."""
