"""A model folder as the recipe says to read it: tokenizer, context length, weights."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from strop.trainer.config import Model, Part, read_text
from strop.trainer.errors import UserError, is_out_of_memory

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face folder; `options` holds chat_template and trust_remote_code, as the recipe's section model does.

    Nothing is downloaded. Every method raises UserError if the folder lacks what it needs or holds it damaged.
    """

    path: Path
    options: Model | Part = field(default_factory=Model)

    def tokenizer(self):
        """The tokenizer, with options.chat_template in place of the folder's own template where it is set."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self.path), **self._source)
        except Exception as e:  # OSError, ValueError, KeyError or TypeError, depending on what is missing
            raise UserError(f"{self.path}: no tokenizer can be loaded from it ({cause_of(e)}); save one there with "
                            "tokenizer.save_pretrained") from e
        if len(tokenizer) == 0:  # what transformers returns for a folder with a config but no tokenizer files
            raise UserError(f"{self.path}: its tokenizer is empty; save one there with tokenizer.save_pretrained")
        if self.options.chat_template is not None:
            tokenizer.chat_template = read_text("model.chat_template", self.options.chat_template)
        try:
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
            raise UserError(f"{self.path}: transformers cannot read its config.json ({cause_of(e)}); "
                            f"{remedy_of(e)}") from e

    def load(self, dtype: torch.dtype, device: torch.device, attention: str = "strop",
             backend: str = "auto") -> nn.Module:
        """The causal LM in eval mode. attention: an attn_implementation; "strop" runs PackedGroups, with `backend`."""
        from transformers import AutoModelForCausalLM

        from strop.kernels.integrations.transformers import fuse_layers, register

        register()
        options = self._source | {"dtype": dtype, "use_safetensors": True, "output_loading_info": True,
                                  "ignore_mismatched_sizes": True}
        try:
            try:
                model, found = AutoModelForCausalLM.from_pretrained(self.path, attn_implementation=attention, **options)
            except ValueError as e:
                if "attention implementation" not in str(e):
                    raise
                model, found = AutoModelForCausalLM.from_pretrained(self.path, attn_implementation="eager", **options)
        except Exception as e:  # OSError, KeyError, SafetensorError, ...: depending on what is wrong with the folder
            if is_out_of_memory(e):
                raise
            raise UserError(f"{self.path}: transformers cannot load it ({cause_of(e)}); {remedy_of(e)}") from e
        # transformers fills missing tensors with random numbers
        for names, what in ((found["missing_keys"], "is missing"),
                            (found["mismatched_keys"], "has another shape than config.json says")):
            if names := sorted(name if isinstance(name, str) else name[0] for name in names):
                raise UserError(f"{self.path}: tensor {names[0]} {what} ({len(names)} in all); save the model again")
        register(model, None if backend == "auto" else backend)
        model = model.to(device).eval()
        if attention == "strop":
            fuse_layers(model)
        return model

    @property
    def _source(self) -> dict:
        return {"local_files_only": True, "trust_remote_code": self.options.trust_remote_code}


def max_positions(config) -> int:
    """The context length that a transformers config states; a very large number where it states none."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def cause_of(error: Exception) -> str:
    """What a library says in its error, in one short line."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return (text if len(text) <= 300 else text[:297] + "...") or type(error).__name__


def remedy_of(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "set model.trust_remote_code=true only if you trust the author of that code"
    return "set another model.path, or save the model again"
