"""The version: what the build reads, and what files and reports say."""

__version__ = "0.1.0"
