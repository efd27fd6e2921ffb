"""Feature networks, and the statistics of reference sets."""
