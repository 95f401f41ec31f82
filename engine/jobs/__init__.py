"""Jobs: one video whose making survives its process."""
