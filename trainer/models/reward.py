"""Reward models: sequence classifiers with one output, the score at a completion's last token."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strop.kernels import Group, PackedGroups
from strop.trainer.errors import UserError, is_out_of_memory
from strop.trainer.models.folders import TOKENIZER_FILES
from strop.trainer.models.loading import ModelFolder, read_object, run_separately
from strop.trainer.models.sequence import Sequence, SlicedGroups, hidden_states

# largest difference between two ways to compute the same score, relative to the largest score, by compute dtype
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
ENDS_TURN = "strop_score_at"  # in config.json of our reward models: the score is read at the end-of-turn token


class Rewarder:
    """Computes the scores of packed groups' completions with a loaded decoder that has a linear head `score`."""

    def __init__(self, model: nn.Module, packed: bool = True):
        """packed=False runs one completion per row, for models whose state crosses completions."""
        self.model, self.packed = model, packed

    def __call__(self, groups: PackedGroups) -> Tensor:
        """fp32 [completions]: the head on the hidden state of each completion's last token. Of SlicedGroups each rank
        computes those of its slice, and gets all."""
        base = base_of(self.model)
        body, head, is_sliced = base.base_model, head_of(base), isinstance(groups, SlicedGroups)
        if self.packed:
            # on the device: no copy to wait for
            ends = groups.end_rows if is_sliced else groups.key_index.index_select(0, groups.key_offsets[1:] - 1)
            hidden = hidden_states(body, groups).index_select(0, ends)
        else:
            hidden = torch.cat([body(input_ids=row, use_cache=False).last_hidden_state[0, -1:]
                                for row in rows_of(groups)])
        bias = None if head.bias is None else head.bias.float()
        scores = F.linear(hidden.float(), head.weight.float(), bias)[:, 0]
        return groups.sequence.join(scores, groups.end_places) if is_sliced else scores


def base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(base: nn.Module) -> nn.Linear | None:
    """The linear head `score` of one output, also where LoRA trains a copy of it; None for other classifiers."""
    head = getattr(base, "score", None)
    if hasattr(head, "modules_to_save"):
        head = head.modules_to_save[head.active_adapters[0]]
    return head if isinstance(head, nn.Linear) and head.out_features == 1 else None


def rows_of(groups: PackedGroups) -> Iterable[Tensor]:
    """[1, tokens]: prompt and completion, for every completion."""
    for (start, end), g in zip(groups.completion_bounds, groups.completion_group, strict=True):
        p0, p1 = groups.prompt_bounds[g]
        yield torch.cat([groups.input_ids[p0:p1], groups.input_ids[start:end]])[None]


@torch.no_grad()
def runs_packed(model: nn.Module, sequence: Sequence | None = None) -> str:
    """Empty if packed scores equal those of the model's own forward on separate rows, also where the ranks of
    `sequence` share a row, else why they do not. The model is left with an attention that runs as the answer says. An
    out-of-memory error is re-raised."""
    base = base_of(model)
    dtype, device, training = base.dtype, next(base.parameters()).device, base.training
    attention, vocab = base.config._attn_implementation, base.get_input_embeddings().weight.shape[0]
    pad = base.config.get_text_config().pad_token_id
    draw = torch.Generator().manual_seed(0)
    ids = [i if i != pad else (i + 1) % vocab for i in torch.randint(0, vocab, (40,), generator=draw).tolist()]
    prompt, first, other, rest = ids[:8], ids[8:14], ids[14:20], [ids[20:25], ids[25:32], ids[32:40]]
    groups = PackedGroups.pack([Group(prompt, [first, *rest])])
    slices = sequence and SlicedGroups.of(groups, sequence).to(device)
    groups = groups.to(device)
    base.eval()
    try:
        truth = own_scores(base, groups, "sdpa")
        rounding = 4 * (own_scores(base, groups, "eager") - truth).abs().max().item()
        if head_of(base) is None:
            return "its head is not a linear layer named score"
        base.set_attn_implementation(attention)
        packed = Rewarder(model)(groups)
        scale = truth.abs().max().item()
        if not (packed - truth).abs().max().item() <= TOLERANCE[dtype] * scale + rounding:
            return "packed rows differ from separate rows"
        changed = PackedGroups.pack([Group(prompt, [other, *rest])]).to(device)
        # the same shapes with other tokens in a sibling: a difference is a leak, not rounding
        if (Rewarder(model)(changed)[1:] - packed[1:]).abs().max().item() > TOLERANCE[dtype] * 1e-3 * scale:
            return "a completion sees its sibling"
        if slices and not (Rewarder(model)(slices) - packed).abs().max().item() <= TOLERANCE[dtype] * scale:
            return "slices of a packed row differ from the whole"
        return ""
    except (ValueError, TypeError, RuntimeError) as e:
        if is_out_of_memory(e):
            raise
        return str(e).splitlines()[0]
    finally:
        base.train(training)


def own_scores(base: nn.Module, groups: PackedGroups, attention: str) -> Tensor:
    """fp32 [completions] by the model's own forward, a row each."""
    run_separately(base) if attention == "sdpa" else base.set_attn_implementation(attention)
    return torch.cat([base(input_ids=row).logits.float().flatten() for row in rows_of(groups)])


def packs(model: nn.Module, console, sequence: Sequence | None = None) -> bool:
    """Whether a reward model in training runs packed; if not it runs one completion per row, with a warning. Raises
    UserError if it has no head that we can train, and if it does not run packed where the ranks of `sequence` share a
    row."""
    name, why = type(base_of(model)).__name__, runs_packed(model, sequence)
    if head_of(base_of(model)) is None:
        raise UserError(f"{name} cannot be trained as a reward model: {why}; start from a decoder, e.g. a Llama or "
                        "Qwen")
    if why and sequence:
        raise UserError(f"engine.sequence_parallel={sequence.size}: {name} does not run in slices of a packed row "
                        f"({why}); set engine.sequence_parallel=1")
    if why:
        run_separately(base_of(model))
        check = PackedGroups.pack([Group([1, 2, 3], [[4, 5], [6]])]).to(next(model.parameters()).device)
        with torch.no_grad():
            ours, own = Rewarder(model, packed=False)(check), own_scores(base_of(model), check, "sdpa")
        if not (ours - own).abs().max() <= 2 * TOLERANCE[base_of(model).dtype] * own.abs().max():
            raise UserError(f"{name}: our scores and its own differ; this model cannot be trained")
        console.warn(f"{name} does not run packed ({why}): one completion per row, slower")
    return not why


def padding_token(tokenizer, ends: set[int]) -> int:
    """A token id to pad with that no completion ends in: transformers reads the score at the last token that is not
    padding, so a padding token equal to the end of turn would move it. Raises UserError if there is none."""
    special = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id,
               *sorted(tokenizer.added_tokens_decoder), *sorted(tokenizer.get_vocab().values())]
    for i in special:
        if i is not None and i not in ends:
            return i
    raise UserError("every token of the tokenizer ends a completion, so none is left for padding; add one")


def copy_tokenizer(source: Path, target: Path, token: str) -> None:
    """Copies the tokenizer files of `source` with `token` as padding token."""
    target.mkdir(parents=True, exist_ok=True)
    for file in (file for pattern in TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()):
        if file.name != "generation_config.json":
            shutil.copyfile(file, target / file.name)
    config = target / "tokenizer_config.json"
    for file in (config, target / "special_tokens_map.json"):
        if file == config or file.exists():
            file.write_text(json.dumps(read_object(file) | {"pad_token": token}, indent=2, ensure_ascii=False) + "\n",
                            encoding="utf-8")


def check_reward_model(path: Path) -> None:
    """Raises UserError unless the folder's config.json describes a sequence classifier with one output."""
    settings = read_object(path / "config.json")
    if not settings:
        raise UserError(f"reward_model={path}: no model folder (it has no config.json)")
    names = [str(name) for name in settings.get("architectures") or []]
    if not any(name.endswith("ForSequenceClassification") for name in names):
        raise UserError(f"reward_model={path}: its config.json names {', '.join(names) or 'no architecture'}, not a "
                        "...ForSequenceClassification; train one with method=reward")
    if (labels := ModelFolder(path).config().num_labels) != 1:
        raise UserError(f"reward_model={path}: has {labels} outputs; a reward model has one (num_labels=1)")
