"""What is drawn with matplotlib, from arrays."""
