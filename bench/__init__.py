"""Benchmarks against what one would use instead: ``make bench``, ``python -m bench [NAME ...]``."""
