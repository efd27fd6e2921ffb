"""Small reference checkpoints trained by this repository."""
