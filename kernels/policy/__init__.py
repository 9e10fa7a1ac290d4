"""Policy-gradient losses over packed token log-probs, with leave-one-out advantages."""

from .loss import POLICY_LOSSES, POLICY_METRICS, leave_one_out, policy_loss

__all__ = ["POLICY_LOSSES", "POLICY_METRICS", "leave_one_out", "policy_loss"]
