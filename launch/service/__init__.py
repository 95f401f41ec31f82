"""The video service: an HTTP API, a queue that survives, and the processes that make the videos."""
