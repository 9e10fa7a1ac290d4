"""AdamW in one pass over memory, and cheaper forms of its state."""

from .adamw import adamw_, available, total_norm
from .formats import STATE, State, join, key_of, new_moments, scales_shape, split
from .many import AdamW, Sums

__all__ = ["STATE", "AdamW", "State", "Sums", "adamw_", "available", "join", "key_of", "new_moments", "scales_shape",
           "split", "total_norm"]
