"""Losses and training loops for the learned parts."""
