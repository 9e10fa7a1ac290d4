"""AdamW in one pass over memory, and cheaper forms of its state."""

from .adamw import adamw_, available, total_norm
from .formats import STATE, join, key_of, new_moments, scales_shape, split

__all__ = ["STATE", "adamw_", "available", "join", "key_of", "new_moments", "scales_shape", "split", "total_norm"]
