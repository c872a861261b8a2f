"""Look at models and pools from outside: speed, cost and pictures."""
