"""Commands that rebuild the zoo."""
