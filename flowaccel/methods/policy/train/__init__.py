"""Training of learned policies by what finished images are worth."""
