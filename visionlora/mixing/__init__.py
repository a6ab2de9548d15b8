"""Several adapters at once: scales by block, part, step and picture, and ways to compose styles."""
