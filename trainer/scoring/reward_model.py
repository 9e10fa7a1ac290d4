"""Reward models as scorers: any folder of a sequence classifier with one output.

The score is that of plain transformers on the whole conversation through the model's chat template: read at the last
token that is not padding. Our own reward models read it at the end-of-turn token, whatever their template puts behind.
Decoders run packed, the completions of a prompt behind their common tokens; what does not run packed is padded.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch

from strop.kernels import Group, PackedGroups
from strop.trainer.data import chat
from strop.trainer.models.loading import ModelFolder, run_separately
from strop.trainer.models.reward import ENDS_TURN, Rewarder, check_reward_model, head_of, runs_packed
from strop.trainer.scoring.base import Item, Scored

BUDGET = 8192  # tokens of a forward pass, unless a single completion has more


class RewardModelScorer:
    """A reward model's score of each completion; see base.Scorer."""

    by_item = False  # its last bits depend on what is packed together

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype):
        check_reward_model(path)
        folder = ModelFolder(path)
        self.path, self.tokenizer = path, folder.tokenizer(needs_template=False)
        self.model = folder.load(dtype, device, reward=True)
        config = self.model.config
        self.pad, self.at_turn = config.get_text_config().pad_token_id, hasattr(config, ENDS_TURN)
        self.limit = folder.context_length()
        self.packed = not runs_packed(self.model)
        if not self.packed:
            run_separately(self.model)

    @torch.no_grad()
    def score(self, items: list[Item], advance: Callable[[int], None]) -> list[Scored]:
        encoded = [self.encode(item) for item in items]
        fits = [i for i, found in enumerate(encoded) if len(found["input_ids"]) <= self.limit]
        values: dict[int, float] = {}
        for part in (self.packs if self.packed else self.batches)(items, encoded, fits):
            values |= self.run_packed(part, encoded) if self.packed else self.run_padded(part, encoded)
            advance(sum(map(len, part)) if self.packed else len(part))
        advance(len(items) - len(fits))
        return [Scored(values[i]) if i in values else Scored(None, error=(
            f"{item.where}: {len(encoded[i]['input_ids']):,} tokens, and {self.limit:,} fit into the reward model"))
            for i, item in enumerate(items)]

    def encode(self, item: Item) -> dict[str, list[int]]:
        """input_ids up to the token at which the score is read, and token_type_ids where the tokenizer has them."""
        if self.tokenizer.chat_template is not None:
            answer = [{"role": "assistant", "content": item.completion}]
            if self.at_turn:
                ids = chat.encode_prompt(self.tokenizer, item.messages)
                ids = ids + chat.encode_completion(self.tokenizer, item.messages, answer).tokens
            else:
                ids = chat.encode_messages(self.tokenizer, [*item.messages, *answer])
            found = {"input_ids": ids}
        else:
            prompt = "\n".join(m["content"] for m in item.messages)
            if head_of(self.model) is None:  # an encoder
                return {k: list(v) for k, v in self.tokenizer(prompt, item.completion).items() if k != "attention_mask"}
            ids, completion = chat.encode_text(self.tokenizer, prompt, item.completion)
            found = {"input_ids": ids + completion.tokens}
        if head_of(self.model) is not None:
            ids = found["input_ids"]
            while len(ids) > 1 and ids[-1] == self.pad:  # as transformers looks for the last token
                ids = ids[:-1]
            found["input_ids"] = ids
        return found

    def packs(self, items: list[Item], encoded: list[dict], fits: list[int]) -> list[list[list[int]]]:
        """Lists of groups, each a list of places in `items` of the same prompt, of up to BUDGET tokens together."""
        parts, used = [[]], 0
        for _, same in groupby(fits, key=lambda i: items[i].messages):
            group, size = [], 0
            for i in same:
                n = len(encoded[i]["input_ids"])
                more = n if not group else n - common([encoded[i]["input_ids"] for i in (group[0], i)])
                if (group or parts[-1]) and used + size + more > BUDGET:
                    if group:
                        parts[-1].append(group)
                    parts.append([])
                    group, used, size, more = [], 0, 0, n
                group.append(i)
                size += more
            parts[-1].append(group)
            used += size
        return [part for part in parts if part]

    def run_packed(self, part: list[list[int]], encoded: list[dict]) -> dict[int, float]:
        groups = []
        for group in part:
            rows = [encoded[i]["input_ids"] for i in group]
            n = common(rows)
            groups.append(Group(rows[0][:n], [row[n:] for row in rows]))
        packed = PackedGroups.pack(groups).to(self.model.device)
        scores = Rewarder(self.model)(packed).tolist()
        return dict(zip((i for group in part for i in group), scores, strict=True))

    def batches(self, items: list[Item], encoded: list[dict], fits: list[int]) -> list[list[int]]:
        """Places of items of about the same length, of up to BUDGET tokens with padding."""
        parts: list[list[int]] = []
        for i in sorted(fits, key=lambda i: (-len(encoded[i]["input_ids"]), i)):
            longest = len(encoded[parts[-1][0]]["input_ids"]) if parts else 0
            if parts and self.pad is not None and longest * (len(parts[-1]) + 1) <= BUDGET:
                parts[-1].append(i)
            else:
                parts.append([i])
        return parts

    def run_padded(self, part: list[int], encoded: list[dict]) -> dict[int, float]:
        longest = len(encoded[part[0]]["input_ids"])
        fill = {"input_ids": self.pad or 0, "token_type_ids": 0, "attention_mask": 0}
        rows = [encoded[i] | {"attention_mask": [1] * len(encoded[i]["input_ids"])} for i in part]
        batch = {name: torch.tensor([row[name] + [fill[name]] * (longest - len(row[name])) for row in rows],
                                    device=self.model.device) for name in rows[0]}
        scores = self.model(**batch).logits.float().flatten().tolist()
        return dict(zip(part, scores, strict=True))

    def close(self) -> None:
        self.model = None


def common(rows: list[list[int]]) -> int:
    """The number of tokens that all rows begin with, and that leave at least one of each."""
    first, most = rows[0], min(map(len, rows)) - 1
    return next((n for n in range(most) if any(row[n] != first[n] for row in rows)), most)
