"""Guesses at next tokens, which a step verifies, several for one read of the weights."""
