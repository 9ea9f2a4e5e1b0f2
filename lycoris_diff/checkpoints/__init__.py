"""Adapter files: a neutral form in memory, and the community's naming and packing schemes around it."""
