"""Losses and loops for the learned parts."""
