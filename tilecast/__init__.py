"""Tuned and reproducible expert GEMMs for Mixture-of-Experts models."""
