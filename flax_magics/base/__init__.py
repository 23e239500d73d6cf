"""Helpers that every room may import: text, files, digests, threads, the version. None knows models or commands."""

__version__ = "0.1.0"
