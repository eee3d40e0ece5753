"""The command line: one file in this folder is one command."""
