"""Adapter files: read to one in-memory `Adapter`, written from it."""
