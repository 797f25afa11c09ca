"""The loop and what it needs; devices.py alone calls pmap."""
