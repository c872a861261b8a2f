"""Queries over blocks: backends and their work plans."""
