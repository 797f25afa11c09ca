"""PyTorch: its weights by name, without PyTorch where the file's format allows that."""
