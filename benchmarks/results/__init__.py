"""The form of all results of `heterostep bench`."""
