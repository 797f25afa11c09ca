"""One page from JSON files: page.py, a file a claim, and what they share."""
