"""The only training loop of the project."""
