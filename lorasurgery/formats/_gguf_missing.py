"""The reason why a side file cannot be rebuilt: a remark to the user, not a failure."""

from __future__ import annotations


class MissingError(Exception):
    """'<file> is not written: <why>.'; caught where they are made and never seen outside."""
