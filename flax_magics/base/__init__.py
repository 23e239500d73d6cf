"""What every room may use: text, files, digests, threads, versions. Knows nothing of models or commands."""
