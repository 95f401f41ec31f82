"""VAEs that decode a few frames at a time, whole pictures or tiles of them."""
