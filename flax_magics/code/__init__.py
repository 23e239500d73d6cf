"""The user's code: what it reads, a fingerprint of it, and which code is the user's and which a library's."""
