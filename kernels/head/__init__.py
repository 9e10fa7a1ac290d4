"""Log-probabilities of target tokens, from hidden states and the head's weight, or from logits."""

from .logprob import gather_logprob, linear_logprob

__all__ = ["gather_logprob", "linear_logprob"]
