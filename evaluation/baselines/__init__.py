"""Caches of other libraries, measured beside ours."""
