"""The commands that rebuild the zoo."""
