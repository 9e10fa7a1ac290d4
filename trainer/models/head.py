"""The output layer of a causal LM."""

from torch import nn

from strop.kernels.integrations import transformers as integration
from strop.kernels.integrations.transformers import Head
from strop.trainer.errors import UserError


def head_of(model: nn.Module) -> Head:
    """The head as `linear_logprob` takes it. Raises UserError on a head that is not a plain linear layer."""
    try:
        return integration.head_of(model)
    except ValueError as e:
        raise UserError(f"{e}; take it out of lora.target_modules or use another model") from e
