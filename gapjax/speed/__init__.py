"""How fast training is, or would be on a TPU."""
