"""Networks that turn images into features, and the statistics of reference sets."""
