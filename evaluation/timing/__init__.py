"""Seconds, multiply-adds and memory of pipeline calls, and where they were measured."""
