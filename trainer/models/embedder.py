"""Embeddings of texts by a model folder as sentence-transformers saves it, with plain transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from strop.trainer.errors import UserError
from strop.trainer.models.folders import find_package
from strop.trainer.models.loading import max_positions, read_object
from strop.trainer.run.files import reason_of

KEY = "filter.embedder"
TOKENS = 16_384  # of a batch
ENCODED = 4096  # texts that are tokenized at once
POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def find_embedder(path: str) -> Path:
    """The folder that filter.embedder names: a folder, or package:NAME for one inside an installed Python package.
    Raises UserError if there is none."""
    if path.startswith("package:"):
        places = find_package(path, KEY).submodule_search_locations or ()
        found = sorted({file.parent for place in places for file in Path(place).rglob("model.safetensors")
                        if (file.parent / "config.json").is_file()})
        if len(found) != 1:
            raise UserError(f"{KEY}={path}: the package holds {len(found)} model folders, one is needed")
        return found[0]
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(f"{KEY}={path}: no folder with a config.json; name one that save_pretrained wrote, or "
                        "package:NAME")
    return folder


class Embedder:
    """Texts to vectors of length 1: the mean of the last hidden states, or the first one where the folder's
    1_Pooling/config.json says so. Raises UserError if the folder cannot be loaded, or pools in another way."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device):
        from transformers import AutoModel, AutoTokenizer

        pooling = read_object(folder / "1_Pooling" / "config.json")
        on = [name for name, value in pooling.items() if name.startswith("pooling_mode_") and value is True]
        if len(on) > 1 or not POOLING.keys() >= set(on):
            raise UserError(f"{KEY}={folder}: {', '.join(on)} in 1_Pooling/config.json; name a model with mean or cls "
                            "pooling")
        self.pooling = POOLING[on[0]] if on else "mean"
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            self.model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=dtype, use_safetensors=True)
        except Exception as e:  # OSError, KeyError, SafetensorError, ...: depending on what is wrong with the folder
            raise UserError(f"{KEY}={folder}: transformers cannot load it ({reason_of(e)}); save the model "
                            "again") from e
        self.model = self.model.to(device).eval()
        self.device, self.width = device, self.model.config.hidden_size
        most = read_object(folder / "sentence_bert_config.json").get("max_seq_length")
        self.length = min(most or 512, max_positions(self.model.config))

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], advance: Callable[[int], None] = lambda n: None) -> Tensor:
        """[texts, width] float16 on the CPU. Texts are cut at the model's length, equal ones are computed once;
        advance(texts) is called as it goes.

        A batch has rows of one length, so that nothing is padded or masked."""
        rows = self.tokens(texts)
        first: dict[bytes, int] = {}
        same = torch.tensor([first.setdefault(row.tobytes(), i) for i, row in enumerate(rows)], dtype=torch.int64)
        advance(len(rows) - len(first))
        found = torch.empty(len(rows), self.width, dtype=torch.float16)
        for length, group in groupby(sorted(first.values(), key=lambda i: len(rows[i])), lambda i: len(rows[i])):
            group = list(group)
            for mine in (group[a:a + max(1, TOKENS // length)] for a in range(0, len(group), max(1, TOKENS // length))):
                batch = torch.from_numpy(np.stack([rows[i] for i in mine])).to(self.device, torch.int64)
                hidden = self.model(input_ids=batch).last_hidden_state
                vectors = hidden[:, 0].float() if self.pooling == "cls" else hidden.mean(1, dtype=torch.float32)
                found[torch.tensor(mine)] = torch.nn.functional.normalize(vectors, dim=1).half().cpu()
                advance(len(mine))
        return found[same]

    def tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text, int32, cut at the model's length; at least one."""
        found = []
        for at in range(0, len(texts), ENCODED):
            part = self.tokenizer(list(texts[at:at + ENCODED]), truncation=True, max_length=self.length)["input_ids"]
            found += [np.array(ids or [0], np.int32) for ids in part]
        return found
