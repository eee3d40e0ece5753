"""What brings a base back byte for byte."""
