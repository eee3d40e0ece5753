"""Dialects: on-disk layouts of adapters. Names and transposes only, no maths."""
