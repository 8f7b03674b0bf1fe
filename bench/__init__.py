"""Benchmarks: each claim of the project, measured beside a rival or a limit."""
