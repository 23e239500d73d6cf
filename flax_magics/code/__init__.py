"""The user's code: what it reads, a fingerprint of that, and which part of it is whose."""
