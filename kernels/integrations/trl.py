"""TRL's DPOTrainer and selective_log_softmax on Strop's head and losses; needs trl 1.16 or later.

TRL's trainer gives its models a forward that, called with `fused_lm_head=True`, returns log-probs of the completion
tokens instead of logits. StropDPOTrainer installs Strop's head there and computes loss and metrics with
preference_loss. Everything else (data, reference model, adapters, precomputed reference log-probs) is TRL's.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from types import MethodType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..head import gather_logprob, linear_logprob
from ..preference import PREFERENCE_METRICS, preference_loss, preference_means
from .transformers import head_of

try:
    import trl
    from accelerate.utils import is_peft_model
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer import dpo_trainer
    from trl.trainer.utils import FusedCausalLMOutput, use_adapter
except ImportError as e:
    raise ImportError("strop.kernels.integrations.trl needs trl 1.16 or later: pip install 'strop[trl]'") from e

_SEAM = {
    dpo_trainer: ("add_fused_lm_head",),
    trl.DPOTrainer: ("_compute_loss", "_precompute_ref_logps", "log"),
}
# If TRL renames a method, the override would silently stop working.
if _missing := [name for owner, names in _SEAM.items() for name in names if not hasattr(owner, name)]:
    raise ImportError(f"trl {trl.__version__} has no {', '.join(_missing)} in dpo_trainer; trl 1.16 is known to work")

# TRL's loss types; "ipo" is "ipo_norm" here, and "sft" the NLL of the chosen completions.
_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot")
_LOSSES += ("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft")

# TRL's names of linear_logprob's stats.
_STATS = {"entropy": "entropy", "log_sum_sq_probs": "log_sum_p2", "mean_logits": "mean_logit", "is_top1": "top1"}

# A row of metrics is those of preference_loss, then these sums over the batch or over ranks.
_COUNTED = ("entropy", "logits/chosen", "logits/rejected", "top1", "chosen", "rejected", "seen", "aux", "ranks")

# Mean difference of log-probs that rounding explains, by the dtype of the weights.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.06}

# Fits int32 and int64, and is outside every vocabulary.
_NO_TARGET = -(2**31)


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """trl.trainer.utils.selective_log_softmax over gather_logprob: log softmax(logits / temperature) at index.

    logits [..., V] bf16, fp16, fp32 or fp64; index [...] or [..., K] integer; row_mask of index's shape, 0 where the
    result is to be 0, whatever the logits there are. Returns index's shape in fp32 (fp64 for fp64); TRL keeps low
    precision on the CPU. Differentiable in logits. Raises ValueError on mismatched shapes and a temperature that is not
    positive; on the CPU also on an index outside the vocabulary.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if index.shape != logits.shape[:-1] and index.shape[:-1] != logits.shape[:-1]:
        raise ValueError(f"index {list(index.shape)} has neither the rows of logits {list(logits.shape)} nor [rows, K]")
    if row_mask is not None and row_mask.shape != index.shape:
        raise ValueError(f"row_mask must have index's shape {list(index.shape)}, got {list(row_mask.shape)}")
    if temperature != 1.0:
        logits = logits / temperature
    masked = None if row_mask is None else row_mask == 0
    if index.shape == logits.shape[:-1]:
        target = index if masked is None else index.masked_fill(masked, _NO_TARGET)
        return gather_logprob(logits, target, ignore_index=_NO_TARGET)
    # One log-sum-exp for all K: gather_logprob for the most likely, the others by their difference from it. Both terms
    # are negative, so nothing cancels.
    picked = logits.gather(-1, index.long())
    picked = picked.to(torch.promote_types(picked.dtype, torch.float32))
    if not picked.numel():
        return picked
    best = picked.argmax(-1, keepdim=True)
    target = index.gather(-1, best).squeeze(-1)
    if masked is not None:
        target = target.masked_fill(masked.all(-1), _NO_TARGET)
    highest = picked.gather(-1, best)
    below = torch.where(picked == highest, 0.0, picked - highest)  # -inf - -inf is NaN
    logp = gather_logprob(logits, target, ignore_index=_NO_TARGET).unsqueeze(-1) + below
    return logp if masked is None else logp.masked_fill(masked, 0.0)


class StropDPOTrainer(trl.DPOTrainer):
    """trl.DPOTrainer on linear_logprob and preference_loss, with the same arguments.

    Loss, gradients, metrics and their names are TRL's. Logits are computed for completion tokens only, one chunk of the
    vocabulary at a time; a frozen head (LoRA) costs two GEMMs. Metrics stay on the device until they are logged.
    Precomputed reference log-probs use the same head.

    Raises ValueError at construction on what it does not support: adapters on the head other than modules_to_save,
    prompt learning, vision and encoder-decoder models, weights sharded or split over devices (FSDP, ZeRO-3, tensor,
    context and sequence parallelism, device_map), label_smoothing with "sigmoid" or "sigmoid_norm", which TRL ignores,
    options that preference_loss rejects, and any model whose own logits give other log-probs than this head.
    """

    def __init__(self, *args, **kwargs):
        self._pending: dict[str, list[Tensor]] = {"train": [], "eval": []}
        # TRL adds its head in the middle of its constructor, before it wraps the reference model and precomputes.
        theirs = dpo_trainer.add_fused_lm_head
        dpo_trainer.add_fused_lm_head = self._add_head
        try:
            super().__init__(*args, **kwargs)
        finally:
            dpo_trainer.add_fused_lm_head = theirs

    def _add_head(self, model: nn.Module, outputs: tuple[str, ...] = ("log_probs",)) -> None:
        """Replaces add_fused_lm_head in TRL's constructor; called for the policy, then for the reference."""
        if not hasattr(self, "_loss_options"):
            self._loss_options = _loss_options(self)
            _check_setup(self)
        _check_model(model)
        _add_head(model, tuple(name for name in outputs if name in _STATS))
        if model.device == self.accelerator.device:  # DeepSpeed moves the weights later
            _compare_with_logits(model)

    def _precompute_ref_logps(self, dataset, name: str, batch_size: int):
        # TRL names its cache file by the dataset and this hash alone.
        weights = self._precompute_model_hash
        of_batch = (self.ld_alpha, self.args.max_length, self.args.truncation_mode)
        self._precompute_model_hash = ("strop", weights, *of_batch)
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = weights

    def _compute_loss(self, model, inputs, return_outputs):
        completion = inputs["completion_mask"]
        segments, scored = _scored(completion)
        labels = inputs["input_ids"].masked_fill(completion == 0, -100)
        for_model = {k: v for k, v in inputs.items() if k not in ("completion_mask", *_REFERENCE)}
        for_head = {"labels": labels, "scored": scored, "fused_lm_head": True}
        routers = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(**for_model, **for_head, **routers)
        if not self.precompute_ref_logps:
            ref_logp = self._reference(for_model | for_head).flatten().index_select(0, scored)
        else:
            ref_logp = torch.stack([inputs[name] for name in _REFERENCE], 1).flatten()
            if self.ld_alpha is not None:
                ref_logp = _sums_as_tokens(ref_logp, segments, self.ld_alpha)
        squares = outputs.log_sum_sq_probs
        loss, metrics = preference_loss(
            outputs.log_probs.flatten().index_select(0, scored), ref_logp, segments=segments,
            num_segments=completion.shape[0],
            log_sum_p2=None if squares is None else squares.flatten().index_select(0, scored), **self._loss_options,
        )
        if outputs.aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        self._remember(metrics, outputs, completion, inputs["attention_mask"])
        if return_outputs:
            with torch.no_grad():
                return loss, model(**for_model, use_cache=False)
        return loss

    @torch.no_grad()
    def _reference(self, inputs: dict) -> Tensor:
        """[2B, T - 1] log-probs of the reference model, or of the policy with the "ref" adapter or none."""
        model, adapter = self.model if self.ref_model is None else self.ref_model, nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            policy = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(policy, "ref" if "ref" in policy.peft_config else None)
        with adapter, disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            return model(**inputs).log_probs

    @torch.no_grad()
    def _remember(self, metrics: Tensor, outputs: FusedCausalLMOutput, completion: Tensor, attention: Tensor) -> None:
        """Store the batch's metrics, summed over ranks, on the device until log."""
        chosen_tokens, rejected_tokens = completion[:, 1:].unflatten(0, (2, -1)).sum((1, 2))
        chosen_logits, rejected_logits = outputs.mean_logits.unflatten(0, (2, -1)).sum((1, 2))
        top1 = outputs.is_top1.chunk(2)[0].sum()
        aux = torch.zeros_like(top1) if outputs.aux_loss is None else outputs.aux_loss
        counted = (outputs.entropy.sum(), chosen_logits, rejected_logits, top1, chosen_tokens, rejected_tokens)
        counted += (attention.sum(), aux, torch.ones_like(aux))
        row = torch.cat([metrics, torch.stack([x.float() for x in counted])])
        self._pending["train" if self.model.training else "eval"].append(self.accelerator.reduce(row, "sum"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """trl.DPOTrainer.log with the metrics of all batches since the last call; copies them to the host."""
        for mode, rows in self._pending.items():
            for row in torch.stack(rows).cpu() if rows else ():
                self._take(mode, row)
            rows.clear()
        super().log(logs, start_time)

    def _take(self, mode: str, row: Tensor) -> None:
        means = preference_means(row[: len(PREFERENCE_METRICS)])
        sums = dict(zip(_COUNTED, row[len(PREFERENCE_METRICS) :].tolist(), strict=True))
        if mode == "train":
            self._total_train_tokens += int(sums["seen"])
        chosen, rejected = max(sums["chosen"], 1.0), max(sums["rejected"], 1.0)
        logged = {"aux_loss": sums["aux"] / sums["ranks"]} if self.aux_loss_enabled else {}
        logged |= {
            "entropy": sums["entropy"] / max(sums["chosen"] + sums["rejected"], 1.0),
            "num_tokens": self._total_train_tokens, "logits/chosen": sums["logits/chosen"] / chosen,
            "logits/rejected": sums["logits/rejected"] / rejected, "mean_token_accuracy": sums["top1"] / chosen,
        }
        for name, value in (logged | {name: means[name] for name in PREFERENCE_METRICS[:6]}).items():
            self._metrics[mode][name].append(value)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]  # a total, not a mean


_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


def _scored(completion: Tensor) -> tuple[Tensor, Tensor]:
    """(segments, scored), each [M] int64, over the M completion tokens of TRL's batch, pair after pair.

    completion [2B, T] is the batch's mask, chosen rows before rejected rows. segments number the completions as chosen,
    rejected, chosen, rejected ...; scored are indices into the flattened [2B, T - 1] predicted tokens.
    """
    by_turns = completion[:, 1:].unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
    # This synchronizes on a GPU: here, right after the trainer's NaN check has done so anyway, rather than between the
    # policy's layers and its head.
    segments, place = by_turns.nonzero(as_tuple=True)
    row = segments % 2 * (completion.shape[0] // 2) + segments // 2
    return segments, row * by_turns.shape[1] + place


def _sums_as_tokens(sums: Tensor, segments: Tensor, ld_alpha: float) -> Tensor:
    """[M] token log-probs whose ld_alpha-weighted sums are `sums` [S].

    A completion's first token carries its sum: its weight is 1, unless the other completion of the pair is empty.
    """
    edges = torch.arange(sums.shape[0] + 1, device=segments.device)
    offsets = torch.searchsorted(segments, edges)
    shorter = offsets.diff().view(-1, 2).amin(1).repeat_interleave(2)
    sums = torch.where(shorter > 0, sums, sums / (ld_alpha or 1.0))
    tokens = sums.new_zeros(segments.shape[0] + 1)  # the last entry is for an empty completion at the end
    return tokens.index_add_(0, offsets[:-1], sums)[:-1]


def _add_head(model: nn.Module, stats: tuple[str, ...]) -> None:
    """Give `model` a forward that, with `fused_lm_head=True`, returns a FusedCausalLMOutput as TRL's does.

    stats: its fields beside log_probs. `scored` (see _scored) saves it from finding the labels.
    """
    theirs, config = model.forward, model.config.get_text_config()

    @functools.wraps(type(model).forward)  # generate checks its arguments against this signature
    def forward(self, *args, fused_lm_head=False, labels=None, scored=None, **kwargs):
        if not fused_lm_head:
            return theirs(*args, **kwargs if labels is None else {**kwargs, "labels": labels})
        if scored is None:
            scored = (labels[:, 1:] != -100).flatten().nonzero().squeeze(1)
        kwargs["use_cache"] = False
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        base = self.base_model(*args, **kwargs)
        rows, length = labels.shape
        place = scored + scored // (length - 1)
        hidden = base.last_hidden_state.flatten(0, 1).index_select(0, place)
        target = labels.flatten().index_select(0, place + 1)
        head = head_of(self)
        if isinstance(head.weight, DTensor) or not head.weight.numel() or head.weight.is_meta:
            raise ValueError(f"{type(self).__name__}: the weight of its head is sharded or offloaded; not supported")
        wanted = tuple(_STATS[name] for name in stats)
        scaling = {"logit_scale": head.scale, "softcap": head.softcap}
        found = linear_logprob(hidden, head.weight, target, head.bias, stats=wanted, **scaling)
        logp, values = found if stats else (found, {})

        def padded(x: Tensor) -> Tensor:
            return x.new_zeros(rows * (length - 1)).index_copy(0, scored, x).view(rows, length - 1)

        fields = {name: padded(values[_STATS[name]]) for name in stats}
        if kwargs.get("output_router_logits"):
            fields["aux_loss"] = _balance(base.router_logits, config, kwargs.get("attention_mask"))
        return FusedCausalLMOutput(log_probs=padded(logp), **fields)

    model.forward = MethodType(forward, model)


def _balance(router_logits, config, attention_mask: Tensor | None) -> Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, attention_mask)


def _loss_options(trainer: trl.DPOTrainer) -> dict:
    """preference_loss's options from DPOConfig. Raises ValueError on unsupported ones."""
    types, weights = trainer.loss_types, trainer.loss_weights
    if unknown := [name for name in types if name not in _LOSSES]:
        raise ValueError(f"unknown loss_type {unknown[0]!r}; known are {sorted(_LOSSES)}")
    if trainer.label_smoothing and (smooth := {"sigmoid", "sigmoid_norm"}.intersection(types)):
        raise ValueError(
            f"label_smoothing={trainer.label_smoothing}: TRL ignores it for {sorted(smooth)[0]!r}; use "
            "loss_type='robust', or set it to 0"
        )
    if trainer.use_weighting and "sft" in types:
        raise ValueError("use_weighting weights pairs, and loss_type 'sft' has none")
    weighted = list(zip(types, weights, strict=True))
    pairs = [(name, weight) for name, weight in weighted if name != "sft"] or [("sigmoid", 0.0)]
    options = {
        "loss_type": ["ipo_norm" if name == "ipo" else name for name, _ in pairs],
        "loss_weights": [weight for _, weight in pairs],
        "nll_weight": sum(weight for name, weight in weighted if name == "sft"), "beta": trainer.beta,
        "label_smoothing": trainer.label_smoothing, "f_divergence": trainer.f_divergence_type,
        "f_alpha": trainer.f_alpha_divergence_coef, "ld_alpha": trainer.ld_alpha,
        "discopop_tau": trainer.args.discopop_tau,
    }
    # Run preference_loss once on a dummy pair, so that it raises now rather than at the first step.
    pair = torch.zeros(2)
    squares = pair if trainer.use_weighting else None
    preference_loss(pair, pair, target_bounds=((0, 1), (1, 2)), log_sum_p2=squares, **options)
    return options


def _check_setup(trainer: trl.DPOTrainer) -> None:
    """Raises ValueError if the head's weight or the batch is sharded when the loss needs it whole."""
    plugin, parallel = trainer.accelerator.state.deepspeed_plugin, trainer.accelerator.parallelism_config
    if trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
        raise ValueError("StropDPOTrainer needs the head's weight whole on each rank: not FSDP or DeepSpeed ZeRO-3")
    for name in ("tp_size", "cp_size", "sp_size"):
        if getattr(parallel, name, 1) > 1:
            raise ValueError(f"StropDPOTrainer does not support parallelism_config.{name}={getattr(parallel, name)}")
    if trainer._is_vlm or trainer._is_vision_dataset:
        raise ValueError("StropDPOTrainer is for text; pass a tokenizer, not a processor, and a dataset without images")
    if is_peft_model(trainer.model):
        for name, config in trainer.model.peft_config.items():
            if config.is_prompt_learning:
                raise ValueError(f"adapter {name!r}: {config.peft_type} adds virtual tokens, which is not supported")


def _check_model(model: nn.Module) -> None:
    """Raises ValueError on a model without a base model and a head, or split over devices."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False) or model.base_model is model:
        raise ValueError(f"{name} is not a decoder with a head on top of a base model")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError(f"{name} is split over devices by its device_map, which is not supported")


def _rounding(device: torch.device, dtype: torch.dtype) -> float:
    """Mean difference of log-probs that rounding explains. TF32 has fp16's mantissa."""
    # Not allow_tf32: reading it raises once the newer fp32_precision is set, as transformers sets it for tf32=True.
    if device.type == "cuda" and dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        dtype = torch.float16
    return _ROUNDING.get(dtype, 1e-4)


@torch.no_grad()
def _compare_with_logits(model: nn.Module) -> None:
    """Raises ValueError if the head's log-probs differ from those of the model's own logits, as when a model scales,
    caps or transforms them in a way that head_of does not know."""
    vocab = model.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (1, 16), generator=draw).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    training = model.training
    model.eval()
    try:
        ours = model(**inputs, labels=ids, fused_lm_head=True).log_probs
        logits = model(**inputs).logits[:, :-1].float()
    finally:
        model.train(training)
    truth = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    tolerance = _rounding(model.device, model.dtype)
    mean = (ours - truth).abs().mean().item()
    if not mean <= tolerance:  # NaN fails too
        raise ValueError(
            f"{type(model).__name__}: our head and its logits differ (a logit scale, cap or layer that is not known "
            f"here): log-probs by {mean:.2g} on average, {tolerance:.2g} is rounding; this model cannot be trained"
        )
