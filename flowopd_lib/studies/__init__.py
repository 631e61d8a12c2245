"""What the notebooks ask."""
