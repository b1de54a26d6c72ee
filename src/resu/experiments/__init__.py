"""Data, models and recipes that reproduce the published tables; nothing in the library imports this."""
