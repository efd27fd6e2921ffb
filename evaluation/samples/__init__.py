"""Samples: what they are made for, how they are seeded, stored and checked."""
