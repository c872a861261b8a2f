"""Which tokens the next step computes; the running sequences as arrays."""
