"""Pricing: method, model and fleet in; FLOPs, bytes, seconds and joules of every client's turn out."""
