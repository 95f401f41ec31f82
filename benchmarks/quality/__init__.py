"""`heterostep bench quality`: dense videos, the same at a share of the work, and what was lost, on a user's weights."""
