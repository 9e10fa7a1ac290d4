"""Embeddings of texts by a model folder as sentence-transformers saves it, with plain transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from strop.trainer.errors import UserError
from strop.trainer.models.folders import find_package
from strop.trainer.models.loading import max_positions, read_object
from strop.trainer.run.files import reason_of

KEY = "filter.embedder"
TOKENS = 16_384  # of a batch, padding included
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

    @torch.no_grad()
    def embed(self, texts: Sequence[str], advance: Callable[[int], None] = lambda n: None) -> Tensor:
        """[texts, width] float16 on the CPU. Texts are cut at the model's length; advance(texts) is called as it goes.
        """
        ids = self.tokenizer(list(texts), truncation=True, max_length=self.length)["input_ids"] if texts else []
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found = torch.empty(len(ids), self.width, dtype=torch.float16)
        at = 0
        while at < len(order):
            size = 1
            while at + size < len(order) and len(ids[order[at + size]]) * (size + 1) <= TOKENS:
                size += 1
            mine = order[at:at + size]
            rows = [torch.tensor(ids[i] or [0]) for i in mine]
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(self.device)
            batch = pad_sequence(rows, batch_first=True).to(self.device)
            hidden = self.model(input_ids=batch, attention_mask=mask).last_hidden_state.float()
            if self.pooling == "cls":
                vectors = hidden[:, 0]
            else:
                vectors = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
            found[torch.tensor(mine)] = torch.nn.functional.normalize(vectors, dim=1).half().cpu()
            at += size
            advance(size)
        return found
