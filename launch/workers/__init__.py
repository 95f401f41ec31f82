"""One group of worker processes: how they are started, meet, make videos together, are watched and replaced."""
