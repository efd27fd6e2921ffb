"""Quality metrics with intervals."""
