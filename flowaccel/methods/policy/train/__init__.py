"""Training of learned policies with rewards of finished images."""
