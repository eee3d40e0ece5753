"""Codecs: how a weight is packed into several tensors. One file is one codec."""
