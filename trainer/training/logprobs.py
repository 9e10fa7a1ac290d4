"""Per-token log-probs of packed groups under a loaded model."""

from collections.abc import Iterator

import torch
from torch import nn

from strop.kernels import PackedGroups, linear_logprob
from strop.trainer.models.head import head_of
from strop.trainer.models.sequence import SlicedGroups, hidden_states


class Scorer:
    """Computes per-token log-probs of packed groups with a loaded model."""

    def __init__(self, model: nn.Module, packed: bool = True):
        """packed=False runs one completion per row, for models whose state crosses completions (see probe)."""
        self.model, self.packed = model, packed

    def __call__(self, groups: PackedGroups, stats: tuple[str, ...] = ()):
        """fp32 log-probs [targets] of `groups.target`; with `stats` also a dict of fp32 [targets] tensors. Of
        SlicedGroups each rank computes those that its slice predicts, and gets all."""
        head, is_sliced = head_of(self.base), isinstance(groups, SlicedGroups)
        found = linear_logprob(self.hidden(groups), head.weight, groups.own_target if is_sliced else groups.target,
                               head.bias, logit_scale=head.scale, softcap=head.softcap, stats=stats)
        if not is_sliced:
            return found

        def joined(values: torch.Tensor) -> torch.Tensor:
            return groups.sequence.join(values, groups.target_places)

        return (joined(found[0]), {name: joined(x) for name, x in found[1].items()}) if stats else joined(found)

    @property
    def base(self) -> nn.Module:
        """The model without adapters around it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def hidden(self, groups: PackedGroups) -> torch.Tensor:
        """Hidden states [targets, D] that predict `groups.target`; of SlicedGroups `own_target`."""
        body = self.base.get_decoder()
        if self.packed:
            rows = groups.pred_rows if isinstance(groups, SlicedGroups) else groups.pred_index
            return hidden_states(body, groups).index_select(0, rows)
        return torch.cat([body(input_ids=row, use_cache=False).last_hidden_state[0].index_select(0, index)
                          for row, index, _ in separate_rows(groups)])


def separate_rows(groups: PackedGroups) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields for every completion its row [1, tokens] with the prompt, and the predicting positions and targets [n].
    Rows have no padding and need no mask, so that this is exact for any causal model, recurrent ones included."""
    for (start, end), g, (first, last) in zip(groups.completion_bounds, groups.completion_group, groups.target_bounds,
                                              strict=True):
        p0, p1 = groups.prompt_bounds[g]
        row = torch.cat([groups.input_ids[p0:p1], groups.input_ids[start:end]])[None]
        yield row, groups.position_ids[groups.pred_index[first:last]], groups.target[first:last]
