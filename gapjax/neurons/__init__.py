"""Position channels (section 5 of the paper): rank them, remove them, show what is lost."""
