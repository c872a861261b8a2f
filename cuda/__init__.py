"""CUDA kernel sources, as package data."""
