"""Preference losses over packed token log-probs or sequence sums."""

from .loss import LOSS_TYPES, PREFERENCE_METRICS, linear_preference_loss, preference_loss, preference_means

__all__ = ["LOSS_TYPES", "PREFERENCE_METRICS", "linear_preference_loss", "preference_loss", "preference_means"]
