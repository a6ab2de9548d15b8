"""Base models: choosing one, opening it, telling two of them apart."""
