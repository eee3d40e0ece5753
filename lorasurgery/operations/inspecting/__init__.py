"""What inspect looks at, and how numbers by layer are shown."""
