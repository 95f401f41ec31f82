"""Load for a running video service: what `heterostep bench serving` does."""
