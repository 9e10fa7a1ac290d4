"""Attention over PackedGroups, and over a cache of keys and values."""

from .prefix import prefix_attention

__all__ = ["prefix_attention"]
