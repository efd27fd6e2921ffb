"""Samples: their conditions, seeds, storage and checks."""
