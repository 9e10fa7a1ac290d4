"""A model folder as the recipe says to read it: tokenizer, context length, weights."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from strop.trainer.config import Model, Part
from strop.trainer.errors import UserError, is_out_of_memory
from strop.trainer.run.files import reason_of

AGAIN = "save the model again, or download it again"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face folder; `options` holds chat_template and trust_remote_code, as the recipe's section model does.

    Nothing is downloaded. Every method raises UserError if the folder lacks what it needs or holds it damaged.
    """

    path: Path
    options: Model | Part = field(default_factory=Model)

    def tokenizer(self, needs_template: bool = True):
        """The tokenizer, with options.chat_template in place of the folder's own template where it is set."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self.path), **self._source)
        except Exception as e:  # OSError, ValueError, KeyError or TypeError, depending on what is missing
            raise UserError(f"{self.path}: no tokenizer can be loaded from it ({reason_of(e)}); save one there with "
                            "tokenizer.save_pretrained") from e
        if len(tokenizer) == 0:  # what transformers returns for a folder with a config but no tokenizer files
            raise UserError(f"{self.path}: its tokenizer is empty; save one there with tokenizer.save_pretrained")
        if self.options.chat_template is not None:
            tokenizer.chat_template = self.options.read("chat_template")
        try:
            if needs_template:
                tokenizer.get_chat_template()
        except ValueError as e:
            raise UserError(f"{self.path}: its tokenizer has no chat template (a base model?); set model.chat_template "
                            "to a Jinja file") from e
        return tokenizer

    def context_length(self) -> int:
        """The most tokens that a prompt and its completion may have together."""
        return max_positions(self.config())

    def config(self):
        """What config.json says, as transformers has it."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path, **self._source)
        except Exception as e:
            raise UserError(f"{self.path}: transformers cannot read its config.json ({reason_of(e)}); "
                            f"{_remedy(e)}") from e

    def load(self, dtype: torch.dtype, device: torch.device, attention: str = "strop",
             backend: str = "auto", reward: bool = False, head_seed: int | None = None,
             on_host: bool = False, fuse: bool = True) -> nn.Module:
        """The causal LM in eval mode. attention: an attn_implementation; "strop" runs PackedGroups, with `backend`.

        reward: a sequence classifier of one label instead. Where the folder holds a causal LM, its score head is drawn
        from `head_seed`, N(0, 1 / (hidden size + 1)) as in Stiennon et al. 2020; without a seed that is an error.
        on_host: leave the weights in the host's memory; the layers are fused for `device` all the same.
        fuse: run a packed model's layers fused."""
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        from strop.kernels.integrations.transformers import fuse_layers, register

        register()
        options = self._source | {"dtype": dtype, "use_safetensors": True, "output_loading_info": True,
                                  "ignore_mismatched_sizes": True}
        options |= {"num_labels": 1} if reward else {}
        load = (AutoModelForSequenceClassification if reward else AutoModelForCausalLM).from_pretrained
        try:
            try:
                model, found = load(self.path, attn_implementation=attention, **options)
            except ValueError as e:
                if "attention implementation" not in str(e):
                    raise
                model, found = load(self.path, attn_implementation="eager", **options)
        except Exception as e:  # OSError, KeyError, SafetensorError, ...: depending on what is wrong with the folder
            if is_out_of_memory(e):
                raise
            raise UserError(f"{self.path}: transformers cannot load it ({reason_of(e)}); {_remedy(e)}") from e
        # transformers fills missing tensors with random numbers
        if head_seed is not None and found["missing_keys"] == {"score.weight"}:
            draw, weight = torch.Generator().manual_seed(head_seed), model.score.weight
            head = torch.randn(weight.shape, generator=draw) * (weight.shape[1] + 1) ** -0.5
            with torch.no_grad():
                weight.copy_(head)
            found["missing_keys"] = set()
        for names, what in ((found["missing_keys"], "is missing"),
                            (found["mismatched_keys"], "has another shape than config.json says")):
            if names := sorted(name if isinstance(name, str) else name[0] for name in names):
                raise UserError(f"{self.path}: tensor {names[0]} {what} ({len(names)} in all); save the model again")
        register(model, None if backend == "auto" else backend)
        model = model.to("cpu" if on_host else device).eval()
        if attention == "strop" and fuse:
            fuse_layers(model, device=device)
        return model

    @property
    def _source(self) -> dict:
        return {"local_files_only": True, "trust_remote_code": self.options.trust_remote_code}


def run_separately(base: nn.Module) -> None:
    """Sets transformers' own attention, for one completion per row."""
    try:
        base.set_attn_implementation("sdpa")
    except ValueError:
        base.set_attn_implementation("eager")


def max_positions(config) -> int:
    """The context length that a transformers config states; a very large number where it states none."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def _remedy(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "set model.trust_remote_code=true only if you trust the author of that code"
    return "set another model.path, or save the model again"


def read_object(file: Path) -> dict:
    """A JSON object; empty where there is no such file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if not isinstance(found, dict):
            raise ValueError(f"it is a {type(found).__name__}")
    except (ValueError, OSError, RecursionError) as e:
        raise UserError(f"{file}: not readable as a JSON object ({reason_of(e)}); {AGAIN}") from e
    return found


def read_tensors(path: Path) -> dict[str, tuple[Path, torch.Tensor]]:
    """Every tensor that transformers loads, mapped but not read, and its file."""
    names, index, found = ["model.safetensors"], path / "model.safetensors.index.json", {}
    if index.exists() and not (path / names[0]).exists():
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
            raise UserError(f"{index}: its weight_map does not map tensors to files of the folder; {AGAIN}")
        names = sorted(set(shards.values()))
    for file in (path / name for name in names):
        try:
            with safe_open(file, "pt") as f:
                found |= {name: (file, f.get_tensor(name)) for name in f.keys()}  # noqa: SIM118
        except Exception as e:  # OSError, SafetensorError, or a dtype that torch does not have
            cause = reason_of(e) if file.exists() else "there is no such file"
            raise UserError(f"{file}: not readable as safetensors ({cause}); {AGAIN}") from e
    return found
