"""Preference losses over packed token log-probs or sequence sums."""

from .listwise import plackett_luce_loss
from .loss import LOSS_TYPES, PREFERENCE_METRICS, linear_preference_loss, preference_loss, preference_means
from .segment_sum import sequence_sums

__all__ = ["LOSS_TYPES", "PREFERENCE_METRICS", "linear_preference_loss", "plackett_luce_loss", "preference_loss",
           "preference_means", "sequence_sums"]
