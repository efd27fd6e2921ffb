"""Seconds, multiply-adds and memory of pipeline calls, and the environment of the measurement."""
