"""What every room may use: text, files, digests, threads, the version. Knows nothing of models or commands."""

__version__ = "0.1.0"
