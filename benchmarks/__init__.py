"""Scripts that measure what the documentation claims, and their recorded results."""
