"""The layer that carries named adapters."""
