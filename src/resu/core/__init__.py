"""Nouns and mechanisms that everything else stands on: torch and numpy only."""
