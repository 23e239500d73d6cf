"""What the edit-and-run loop takes, beside the same work by hand: `python -m tests.benchmarks`; see README.md."""
