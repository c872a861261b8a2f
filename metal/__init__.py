"""Metal kernel sources, as package data."""
