"""DPO and related losses: preference optimization on packed pairs against a table of reference log-probs."""

from pathlib import Path

import torch

from strop.kernels import PREFERENCE_METRICS, preference_loss, preference_means
from strop.trainer.config import Dpo, Log, Lora, Part
from strop.trainer.errors import UserError
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.store import Stage
from strop.trainer.training.batch import plan_steps
from strop.trainer.training.engines import open_engine
from strop.trainer.training.guard import open_guard
from strop.trainer.training.logprobs import Scorer
from strop.trainer.training.loop import train
from strop.trainer.training.pairs import Origin, ReferenceTable, load_pairs, off_policy, origins_of, reward_margins
from strop.trainer.training.probe import probe
from strop.trainer.training.rated import Baseline, labeled_loss, limit_of, listed_loss, load_rated, means_of

# The reference stage uses the same microbatches, so that equal weights give equal bits at step 0, unless the stages ran
# with different numbers of ranks or threads or on different machines. Then this (mean, maximum) difference of per-token
# log-probs passes, by dtype, with a warning. Other packings of the quickstart's pairs in bf16 differ by at most 0.007
# and 0.26.
STEP_ZERO = {torch.float32: (5e-5, 8e-4), torch.bfloat16: (0.03, 1.0)}


def dpo(stage: Stage, *, dpo: Dpo, lora: Lora, model: Part, compute: Part, log: Log, seed: int, select: Path,
        policy: Path, reference: Path, same_weights: bool, policy_hash: str | None = None,
        evaluate: Part | None = None, prompts: Path | None = None, mix: dict[str, float] | None = None) -> None:
    """Trains the weights `policy` on select/pairs.parquet, or with the losses of labels and lists on rated.parquet;
    writes model/, snapshots/, ema/ and guard.json.

    compute: the recipe's dtype and attention. same_weights: policy and reference have the same weights, so all
    log-ratios of step 0 must be zero. policy_hash: tells which pairs the policy wrote. prompts and evaluate's
    max_new_tokens: for the checks during training. mix: factors of the rows' weights by source. Raises UserError if no
    pair is left to train on in the first round (later the weights stay as they are), or step 0 fails this check.
    """
    folder = ModelFolder(policy, model)
    context, margins = folder.context_length(), None
    if dpo.rows == "pairs":
        path = select / "pairs.parquet"
        pairs = load_pairs(stage, path, dpo, context, record=True, mix=mix)
        origins = origins_of(path, pairs)
        mixed = mixed_writers(stage, origins)
        margins = reward_margins(path, pairs) if dpo.loss == "rpo" else None
    else:
        pairs = load_rated(stage, select / "rated.parquet", dpo, dpo.rows, context, record=True, mix=mix)
        origins, mixed = [pair.origins for pair in pairs], 0
    table = ReferenceTable(reference / "reference.parquet")
    plan = plan_steps(pairs, dpo.epochs, dpo.batch_size, seed)
    engine = open_engine(folder, dpo, stage, len(plan), compute=compute, lora=lora, seed=seed)
    engine.score_with(Scorer(engine.model, engine.run(probe, engine.model, stage.console, engine.mesh.sequence)))
    rounding = 0.0  # largest mean difference between policy and reference in a microbatch of step 0
    names, finish, baseline = PREFERENCE_METRICS, preference_means, None
    if dpo.rows == "labels":
        baseline = Baseline(dpo, engine, table, pairs, plan, min(limit_of(dpo, context), dpo.max_tokens))
        names, finish = (*names, baseline.name), means_of(baseline.name)

    def totals(rows):
        found = {"pairs": len(rows)}
        if dpo.rows == "pairs":
            found["chosen_tokens"] = sum(pairs[i].nll_targets()[0] for i in rows)
        return found | ({"baseline": baseline()} if baseline else {})

    def loss(groups, step):
        logp = engine.logprobs(groups)
        ref = table.of(pairs, step.rows, logp.device)
        if step.index == 0 and same_weights:
            nonlocal rounding
            found = step_zero(logp.detach(), ref, engine.dtype, stage.name)
            if found > rounding == 0.0:
                stage.console.warn(f"{stage.name}: step 0: log-probs differ from the reference's by {found:.2g} on "
                                   "average although the weights are the same: rounding, because the reference was "
                                   "computed with another number of processes or threads, or on another machine")
            rounding = max(found, rounding)
        if dpo.rows == "labels":
            return labeled_loss(dpo, pairs, step.rows, groups, logp, ref, step.totals["baseline"], step.totals["pairs"])
        if dpo.rows == "lists":
            return listed_loss(dpo, pairs, step.rows, groups, logp, ref, step.totals["pairs"])
        denominator = step.totals["chosen_tokens" if dpo.nll_normalization == "batch_tokens" else "pairs"]
        margin = None if margins is None else torch.tensor([margins[i] for i in step.rows])
        if margin is not None and logp.is_cuda:
            margin = margin.pin_memory().to(logp.device, non_blocking=True)
        return preference_loss(
            logp, ref, segments=groups.target_segment, num_segments=groups.num_completions,
            loss_mask=groups.loss_mask, nll_mask=groups.nll_mask, loss_type=dpo.loss, beta=dpo.beta,
            label_smoothing=dpo.label_smoothing, nll_weight=dpo.nll_weight, nll_normalization=dpo.nll_normalization,
            pair_denominator=step.totals["pairs"], nll_denominator=denominator, reward_margin=margin,
            rpo_eta=dpo.rpo_eta, rpo_divergence=dpo.rpo_divergence)

    learned = [pair for pair in pairs if dpo.rows != "labels" or pair.ratings[0] > 0]
    guard = open_guard(stage, engine, learned, prompts, evaluate)
    steps = train(stage, engine, pairs, plan, totals, loss, names, finish, log.interval, guard)
    tokens = sum(pairs[i].tokens for rows in plan[:steps] for i in rows)
    stage.counts |= {{"pairs": "pairs", "labels": "completions", "lists": "lists"}[dpo.rows]: len(pairs)}
    stage.counts |= {"desirable": len(learned)} if dpo.rows == "labels" else {}
    stage.counts |= {"steps": steps, "tokens": tokens} | off_policy(origins, pairs, table, policy_hash)
    if mixed:
        stage.counts["mixed_writer_pairs"] = mixed


def mixed_writers(stage: Stage, origins: list[tuple[Origin, ...]]) -> int:
    """The number of pairs whose sides have different writers; warns of them."""
    mixed = sum(len({origin.writer for origin in sides}) > 1 for sides in origins)
    if mixed:
        stage.console.warn(f"{stage.name}: {mixed} of {len(origins)} pairs have sides by different writers "
                           "(off-policy): the loss also learns to tell the writers apart; watch logps/chosen and the "
                           "pass rates")
    return mixed


def check_loss(section: Dpo, key: str = "dpo") -> None:
    """Raises UserError, before anything runs, if the loss and its parameters do not go together. key: of the section
    in the recipe."""
    if section.rows != "pairs":
        return  # the section itself refuses what they do not read
    try:
        preference_loss(torch.zeros(2), torch.zeros(2), segments=torch.arange(2), num_segments=2,
                        loss_type=section.loss, beta=section.beta, label_smoothing=section.label_smoothing,
                        nll_weight=section.nll_weight,
                        reward_margin=torch.ones(1) if section.loss == "rpo" else None)
    except ValueError as e:
        raise UserError(f"{key}.loss={section.loss}: {e}") from e


def step_zero(logp: torch.Tensor, ref: torch.Tensor, dtype: torch.dtype, name: str) -> float:
    """Mean difference of policy and reference log-probs. Raises UserError if it is more than rounding."""
    if logp.numel() == 0:
        return 0.0
    difference = (logp - ref).abs()
    mean, worst = difference.mean().item(), difference.max().item()
    if not (mean <= STEP_ZERO[dtype][0] and worst <= STEP_ZERO[dtype][1]):  # NaN fails too
        raise UserError(f"{name}: step 0: policy and reference are the same weights, but their per-token log-probs "
                         f"differ by {mean:.2g} on average, {worst:.2g} at most; nothing was trained. Delete the "
                         "folder of the reference stage to re-run it")
    return mean
