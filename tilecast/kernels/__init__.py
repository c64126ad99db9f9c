"""Implementations of the expert GEMMs, their registry, the router and the float64 oracle."""
