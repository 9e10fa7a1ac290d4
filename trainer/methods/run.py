"""The API of methods: verbs that run a stage or return its cached artifact, and the promotion of weights."""

import shutil
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Literal

from strop.trainer.config import (
    Dpo,
    Evaluate,
    Merge,
    Model,
    Recipe,
    Reward,
    Score,
    Scorer,
    Select,
    Sft,
    Source,
    Train,
    Writing,
)
from strop.trainer.data.ready import check_ready
from strop.trainer.data.rows import counted
from strop.trainer.data.splits import allot
from strop.trainer.engines import WRITERS, LocalWriter, OpenAI, Revising, SampleModels, Sampling, Writer
from strop.trainer.errors import UserError
from strop.trainer.method_recipes import Online, Safety
from strop.trainer.models.embedder import find_embedder
from strop.trainer.models.folders import Base, packaged_rows
from strop.trainer.models.hub import is_loaded
from strop.trainer.models.loading import ModelFolder
from strop.trainer.models.reward import check_reward_model
from strop.trainer.reports.statistics import merits
from strop.trainer.run.artifacts import Artifact, check_unchanged, external
from strop.trainer.run.files import hash_json, read_json, write_json
from strop.trainer.run.store import Store
from strop.trainer.scoring.ahead import Ahead
from strop.trainer.scoring.base import check_scorer
from strop.trainer.scoring.table import models_of
from strop.trainer.stages.compare import compare
from strop.trainer.stages.evaluate import held_out
from strop.trainer.stages.merge import average, merge
from strop.trainer.stages.online import online
from strop.trainer.stages.preference import check_loss, dpo
from strop.trainer.stages.prompts import prompts
from strop.trainer.stages.publish import publish
from strop.trainer.stages.reference import reference
from strop.trainer.stages.results import evaluate
from strop.trainer.stages.revise import revise
from strop.trainer.stages.reward import reward
from strop.trainer.stages.sample import gather, sample
from strop.trainer.stages.score import score
from strop.trainer.stages.select import select
from strop.trainer.stages.sft import sft
from strop.trainer.stages.write_prompts import write_prompts
from strop.trainer.training.engines import check_engine
from strop.trainer.training.mesh import check_sequence, size_of

BY_REWARD = {"by": None, "sft_min_score": None, "pass_rate_min": 0.0, "pass_rate_max": 1.0}  # select without verdicts
# keys of dpo that the reference table depends on
PAIR_ROWS = ("max_tokens", "max_length", "mask_template_tokens", "epochs", "batch_size")


class Run:
    """The verbs of a method. Each takes its section of the recipe and artifacts, and returns an artifact, cached if it
    is up to date. While planning nothing runs, and artifacts that do not exist yet have no hash.

    start: the recipe's start weights. data: {dataset of the hub: (file, commit)}. others: {path of a writer: its
    weights}. Verbs inside `rounds` write to round-NN/<name>.
    """

    def __init__(self, store: Store, recipe: Recipe, base: Base, data: dict | None = None,
                 others: dict[str, Base] | None = None):
        self.store, self.recipe, self.base, self.data = store, recipe, base, data or {}
        self.others = others or {}
        self.start = Artifact(base.path, None)
        if base.path.exists():
            self.start = external(base.path, is_loaded)
        self._files: dict[str, Artifact] = {}  # the rows' files as they were when the run began
        for entry in (*recipe.data.sources, *recipe.data.sft, *recipe.data.preferences):
            self._rows(entry.path)
        self.round: int | None = None
        self._parts: dict[Path, list[Artifact]] = {}  # folder of samples -> what gather made them of
        self.measured: dict[str, tuple[Artifact, str]] = {}  # weights' hash -> (evaluation, candidate in it)
        self.promotions: list[dict] = []
        self.promoted: list[Artifact] = []  # by round
        self._loading = recipe.model.only("chat_template", "trust_remote_code")
        self._numbers = recipe.only("dtype", "device")
        self._compute = recipe.only("dtype", "device", "attention", "engine")
        self._checks = recipe.evaluate.only("max_new_tokens")  # the checks of training sample as evaluate does
        commits = {path: commit for path, (_, commit) in self.data.items()}
        commits |= {recipe.model.path: base.revision} if base.revision else {}
        self._about_base = {"base_model": base.name, "license": base.license, "base_from_gguf": base.from_gguf,
                            "base_hash": self.start.hash, "revision": base.revision, "revisions": commits}
        store.about = {"name": recipe.name, "method": recipe.method, "base": self._about_base}
        for key, dpo_section in (("dpo", recipe.dpo), ("rpo", getattr(recipe, "rpo", None))):
            if dpo_section and dpo_section.enabled:
                check_loss(dpo_section, key)
        ranks, trained = None if store.planning else store.world.size, {n: s for n, s in recipe if isinstance(s, Train)}
        check_sequence(recipe.engine, ModelFolder(base.path, recipe.model), ranks, trained)
        if not store.planning:  # a plan may be for another machine
            check_engine(recipe.engine, hasattr(recipe, "online") and recipe.online.enabled)
        who = f"method {recipe.method}" if "dpo" in getattr(recipe, "UNREAD", ()) else f"dpo.loss={recipe.dpo.loss}"
        for ready in recipe.data.preferences if recipe.dpo.enabled and store.world.first else ():
            if (file := self._rows(ready.path).path).exists():
                check_ready(ready.model_copy(update={"path": file}), recipe.dpo.rows, who)
        for scorer in () if store.planning or not store.world.first else self._distinct_scorers():
            check_scorer(scorer, Path(scorer.python.rpartition(":")[0]) if scorer.python else None)

    def rounds(self, n: int):
        """Yields 0 to n - 1; verbs called in the loop's body belong to that round."""
        for self.round in range(n):
            if not self.store.planning:
                self.store.console.heading(f"round {self.round + 1} of {n}")
            yield self.round
        self.round = None

    def _stage(self, name: str, function, kind: str, config: dict, inputs: dict, **how) -> Artifact:
        folder = name if self.round is None else f"round-{self.round:02}/{name}"
        return self.store.stage(folder, function, kind=kind, config=config, inputs=inputs, round=self.round, **how)

    def prompts(self) -> Artifact:
        """The prompts of data.sources, filtered and split into train, validation and test."""
        r = self.recipe
        config = {"data": r.data.only("sources", "validation", "test", "max_bad_rows"), "seed": r.seed,
                  "filter": r.filter.only("near_duplicates", "decontaminate", "max_repetition")}
        files = {s.name: self._rows(s.path) for s in r.data.sources if s.path}
        config["rules"] = {s.name: [[c.rule, c.args] for c in s.scoring if c.rule] for s in r.data.sources}
        return self._stage("prompts", prompts, "prompts", config, {"files": files})

    def write_prompts(self, section: Writing, weights: Artifact, prompts: Artifact,
                      name: str = "write_prompts") -> Artifact:
        """`prompts` and new training prompts, written by `weights` or by the model that the section names."""
        r, source, student = self.recipe, self.recipe.seed_source, self._loading
        if isinstance(section, OpenAI) and "{weights}" not in section.model:
            weights = self.start  # only the tokenizer counts
        elif getattr(section, "path", None) is not None:
            weights, student = self._other(section.path), Model().only("chat_template", "trust_remote_code")
        config = {"write": section, "source": source.only("name", "system_prompt", "prompt_template", "answer_column"),
                  "rules": [[c.rule, c.args] for c in source.scoring if c.rule], "sources": self._templates,
                  "filter": r.filter.only("near_duplicates", "decontaminate", "max_repetition"), "seed": r.seed,
                  "model": student, "compute": self._numbers}
        return self._stage(name, write_prompts, "synthetic prompts", config,
                           {"round": self.round or 0, "weights": weights, "prompts": prompts}, all_ranks=True)

    def _other(self, path: str) -> Artifact:
        """The weights of a writer that are not of this run."""
        base = self.others[path]
        return external(base.path, is_loaded) if base.path.exists() else Artifact(base.path, None)

    def _rows(self, path: str | None) -> Artifact | None:
        """The file of rows that a recipe names; without a hash while it is not downloaded yet. Raises UserError if it
        changed since the run began: its rounds would learn from different data under one name."""
        if path is None:
            return None
        path = str(packaged_rows(path)) if path.startswith("package:") else path
        file, commit = self.data.get(path, (path, "local"))
        if not commit:
            return Artifact(file, None)
        if path not in self._files:
            self._files[path] = external(file, counted(file))
        check_unchanged(self._files[path])
        return self._files[path]

    def sample(self, section: Sampling, weights: Artifact | dict[str, Artifact], prompts: Artifact,
               name: str = "sample", score: Score | None = None, split: Literal["train", "test"] = "train") -> Artifact:
        """K completions of prompts by `weights`, or by the writers that the section lists. Several weights by name
        divide K among them. These are this round's prompts, or with another name than sample another draw of the
        training prompts, or of those of another split. score: for samples that are then scored with this section;
        scoring begins while they are drawn.

        With several writers each is a stage of its own, so that a change of one asks no other again."""
        seed = self.recipe.seed if name == "sample" else int(hash_json([self.recipe.seed, name])[:15], 16)
        if isinstance(weights, dict):
            writer = WRITERS[section.engine]
            keys = {key: value for key, value in section if key in writer.model_fields}
            there = {n: (writer(name=n, **keys), folder) for n, folder in weights.items()}
        elif isinstance(section, SampleModels):
            there = {w.name: (w, self._weights_of(w, weights)) for w in section.models}
            there = {name: pair for name, pair in there.items() if pair[1] is not None}
        else:
            return self._write(name, section, section, weights, prompts, seed, "samples", score, split)
        if not there:
            raise UserError(f"sample.models: no writer has weights in round {self.round}; add one with weights=current")
        share = allot(section.k, {n: w.share for n, (w, _) in there.items()}, dict.fromkeys(there, section.k))
        if idle := [n for n, k in share.items() if not k]:
            raise UserError(f"sample.models: the share of {idle[0]} in sample.k={section.k} is less than one "
                            "completion; raise sample.k or its share")
        made, first = {}, 0
        for n, (writer, folder) in there.items():
            made[n] = self._write(f"{name}-{n}", section.only(*Sampling.model_fields), writer, folder, prompts,
                                  seed, "writer", score, split, first=first, k=share[n])
            first += share[n]
        return self.gather(made, name)

    def revise(self, section: Revising, weights: Artifact, samples: Artifact, prompts: Artifact,
               scores: Artifact | None = None, name: str = "revise", chosen: Artifact | None = None) -> Artifact:
        """Revisions of samples by `weights`, or by the server that the section names, as samples of the same prompts
        under other numbers. scores: of the samples, with section.feedback=errors. chosen: a selection; only what its
        pairs chose is revised."""
        r = self.recipe
        config = {"revise": section, "model": self._loading, "compute": self._numbers, "seed": r.seed}
        inputs = {"round": self.round, "weights": weights, "prompts": prompts, "sample": samples,
                  "student": self.start, "writer_hash": weights.hash}
        if isinstance(section, OpenAI) and "{weights}" not in section.model:
            inputs |= {"weights": self.start, "writer_hash": None}
        if section.feedback == "errors":
            if scores is None:
                raise UserError(f"{name}: revise.feedback=errors needs the scores of the samples; pass scores")
            config |= {"score": r.score.only("correct_by", "correct_at"), "judging": weights_of(r.sources)}
            inputs["scores"] = scores
        if chosen is not None:
            inputs["selection"] = chosen
        return self._stage(name, revise, "revisions", config, inputs, all_ranks=True)

    def gather(self, samples: dict[str, Artifact], name: str) -> Artifact:
        """Several artifacts of samples as one, e.g. samples and their revisions, to be scored and paired together."""
        made = self._stage(name, gather, "samples", {}, {"writers": samples})
        self._parts[made.path] = list(samples.values())
        return made

    def _weights_of(self, writer: Writer, current: Artifact) -> Artifact | None:
        """The weights of a writer in this round; None if there are none yet."""
        if not isinstance(writer, LocalWriter):
            return current
        if writer.path is not None:
            return self._other(writer.path)
        named = {"current": current, "start": self.start} | {f"round-{r:02}": a for r, a in enumerate(self.promoted)}
        return named.get(writer.weights)

    def _write(self, name: str, section, writer, weights: Artifact, prompts: Artifact, seed: int, kind: str,
               score: Score | None, split: str, **share) -> Artifact:
        r = self.recipe
        config = {"sample": section, "shares": {s.name: s.share for s in r.sources}, "seed": seed,
                  "model": self._loading, "compute": self._numbers, **share}
        config |= {} if split == "train" else {"split": split}
        inputs = {"round": self.round, "weights": weights, "prompts": prompts, "writer_hash": weights.hash}
        if writer is not section:
            config["writer"] = writer
        if section.enough is not None:
            scoring, inputs["files"] = self._scoring(r.sources)
            config |= scoring | {"score": r.score, "judging": weights_of(r.sources)}
        if isinstance(writer, OpenAI) and "{weights}" not in writer.model:
            # it writes the same whatever this run trains: only the tokenizer counts
            inputs |= {"weights": self.start, "writer_hash": None}
        elif getattr(writer, "path", None) is not None:
            config["own"] = Model().only("chat_template", "trust_remote_code")
            inputs["student"] = self.start
        ahead = None
        if score is not None and not self.store.planning:
            scoring, scored_by = self._scoring(r.sources)
            ahead = partial(Ahead, whole=not share, files={file: a.path for file, a in scored_by.items()}, score=score,
                            prompts=prompts.path, **scoring)
        return self._stage(name, sample, kind, config, inputs, all_ranks=True, ahead=ahead)

    def _scoring(self, sources: list[Source]) -> tuple[dict, dict]:
        """(scorers and columns of each source, with dtype and device if one is a model; the files and folders that
        scorers name)"""
        files = {c.python.rpartition(":")[0] for s in sources for c in s.scoring if c.python}
        config = {"scorers": {s.name: s.scoring for s in sources}, "columns": columns_of(sources)}
        found = {file: external(file) for file in sorted(files)}
        for scorer in (c for s in sources for c in s.scoring):
            for name in models_of(scorer):
                if scorer.reward_model:
                    check_reward_model(Path(name).expanduser())
                found[name] = external(name) if name else self.start
            if scorer.reward_model or scorer.judge:
                config["compute"] = self._numbers
        return config, found

    def _distinct_scorers(self) -> list[Scorer]:
        """One of each kind of code and one per function of the user."""
        found = {c.python or c.code.kind: c for s in self.recipe.data.sources for c in s.scoring if c.python or c.code}
        return list(found.values())

    @property
    def _templates(self) -> dict[str, dict]:
        return {s.name: {"prompt_template": s.prompt_template, "templated": s.templated} for s in self.recipe.sources}

    def score(self, section: Score, samples: Artifact, prompts: Artifact, name: str = "score",
              models: dict[str, Artifact] | None = None, safety: Safety | None = None) -> Artifact:
        """The values of every completion by every scorer of its source, or by `models` alone: reward models that this
        run trained, by name. safety: of models `helpfulness` and `safety`, which of the two makes a value `reward`."""
        config, files = self._scoring(self.recipe.sources) if models is None else self._rewarding(models)
        config |= {"score": section.only("max_errors", "workers")}
        config |= {"safety": safety.only("sources", "threshold")} if safety else {}
        made = self._stage(name, score, "scores" if models is None else "rewards", config,
                           {"prompts": prompts, "sample": samples, "files": files}, all_ranks=True)
        if not self.store.planning and self.store.world.first:
            for part in (samples, *self._parts.get(samples.path, ())):
                shutil.rmtree(part.path.with_name(f"{part.path.name}.scored"), ignore_errors=True)
        return made

    def _rewarding(self, models: dict[str, Artifact]) -> tuple[dict, dict]:
        """As _scoring, of reward models that this run trained."""
        scorers = [Scorer(name=name, reward_model=name) for name in models]
        return {"scorers": {s.name: scorers for s in self.recipe.sources}, "compute": self._numbers,
                "columns": columns_of(self.recipe.sources)}, dict(models)

    def select(self, section: Select, prompts: Artifact | None, history: list[tuple[Artifact, Artifact | None]],
               name: str = "select", *, rewards: Collection[str] = (), without: Literal["sft", "pairs"] | None = None,
               so_far: bool = False, only: dict[str, float] | None = None, corrections: bool = False) -> Artifact:
        """SFT rows, and pairs or what else the preference loss learns from, of the (samples, scores) of all rounds so
        far and this round's ready data. Samples with None for scores are as good as each other.

        rewards: the scores are those of reward models of this run, which gave values of these names; then the best
        completions by `reward` become SFT rows, whatever their score, and none is correct or wrong. without: rows that
        are not made. so_far: ready data of earlier rounds too, and all of history. only: names of the sources and ready
        data whose rows are made, each with a factor of the rows' weights. corrections: pair correct revisions with the
        completions that they revise, not the best with the worst."""
        r = self.recipe
        config = {"select": section, "score": r.score, "weights": weights_of(r.sources), "filter": r.filter,
                  "data": r.data.only("sft", "preferences", "max_bad_rows"),
                  "sources": self._templates, "model": self._loading, "seed": r.seed}
        if so_far:
            config["select"] = section.model_copy(update={"accumulate": True})
        if rewards:
            config |= {"select": section.model_copy(update=BY_REWARD), "score": None,
                       "weights": {s.name: dict.fromkeys(rewards, 0.0) | {"reward": 1.0} for s in r.sources}}
        config |= ({"without": without} if without else {}) | ({"only": only} if only else {})
        config |= {"rows": r.dpo.rows} if r.dpo.rows != "pairs" else {}
        config |= {"corrections": True} if corrections else {}
        ready = {"sft": r.data.sft if without != "sft" else [],
                 "preferences": r.data.preferences if without != "pairs" else []}
        files = {kind: {d.name: self._rows(d.path) for d in entries
                        if d.used_in(self.round, so_far) and (only is None or d.name in only)}
                 for kind, entries in ready.items()}
        inputs = {"round": self.round, "prompts": prompts, "history": history, "tokenizer": self.start, "files": files}
        if r.filter.semantic:
            config["compute"] = self._numbers
            inputs["embedder"] = external(find_embedder(r.filter.embedder), is_loaded)
        if section.topic_share < 1:
            config["topics"] = {s.name: s.topic for s in r.sources}
        return self._stage(name, select, "best" if rewards else "selection", config, inputs)

    def _training(self, seed: int | None = None, mix: dict[str, float] | None = None, **sections) -> dict:
        sections |= {"mix": mix} if mix else {}
        return sections | {"lora": self.recipe.lora, "model": self._loading, "compute": self._compute,
                           "log": self.recipe.log, "seed": self.recipe.seed if seed is None else seed}

    def sft(self, section: Sft, selected: Artifact, start: Artifact, prompts: Artifact | None = None,
            name: str = "sft", seed: int | None = None, mix: dict[str, float] | None = None) -> Artifact:
        """`start` fine-tuned on the selected completions; its weights are `.model`. prompts: for the checks. seed:
        instead of the recipe's. mix: factors of the rows' weights, by source or ready data."""
        inputs = {"select": selected, "start": start, "prompts": prompts if section.eval_steps else None}
        return self._stage(name, sft, "training", self._training(seed, mix, sft=section, evaluate=self._checks), inputs,
                           title="SFT", all_ranks=True)

    def prefer(self, section: Dpo, selected: Artifact, policy: Artifact, reference_weights: Artifact,
               prompts: Artifact | None = None, name: str = "dpo", seed: int | None = None,
               mix: dict[str, float] | None = None) -> Artifact:
        """`policy` trained on the selected pairs, or what else section.loss learns from, against the log-probs of
        `reference_weights`. prompts: for the checks. seed, mix: as in `sft`."""
        config = {"dpo": section.only(*PAIR_ROWS), "model": self._loading, "compute": self._compute,
                  "seed": self.recipe.seed if seed is None else seed, "rows": section.rows,
                  "mismatches": section.loss == "kto"} | ({"mix": mix} if mix else {})
        table = self._stage("reference" if name == "dpo" else f"{name}-reference", reference, "log-probs", config,
                            {"select": selected, "weights": reference_weights}, all_ranks=True)
        inputs = {"select": selected, "policy": policy, "reference": table,
                  "same_weights": reference_weights.hash == policy.hash, "policy_hash": policy.hash,
                  "prompts": prompts if section.eval_steps else None}
        return self._stage(name, dpo, "training", self._training(seed, mix, dpo=section, evaluate=self._checks), inputs,
                           title="RPO" if section.loss == "rpo" else "DPO", all_ranks=True)

    def reward(self, section: Reward, selected: Artifact, start: Artifact,
               history: list[tuple[Artifact, Artifact]] = (), name: str = "reward",
               seed: int | None = None, mix: dict[str, float] | None = None) -> Artifact:
        """A reward model from `start`, a causal LM or a reward model, trained on the selected pairs; its weights are
        `.model`. history: (samples, selection) of rounds, whose completions section.pairs=all ranks. seed: of the
        order of the data; which pairs are held out stays the recipe's. mix: as in `sft`."""
        inputs = {"select": selected, "start": start, "history": list(history) if section.pairs == "all" else []}
        config = self._training(mix=mix, reward=section) | ({} if seed is None else {"order": seed})
        return self._stage(name, reward, "reward", config, inputs, title="reward model", all_ranks=True)

    def average(self, name: str, runs: list[Artifact]) -> Artifact:
        """The uniform average of the last weights of several trainings from one start, at `.model`; of one training
        its own artifact."""
        if len(runs) == 1:
            return runs[0]
        return self._stage(name, average, "weights", {}, {"runs": [run.model for run in runs]})

    def online(self, section: Online, policy: Artifact, prompts: Artifact, reference: Artifact | None = None,
               name: str = "online", models: dict[str, Artifact] | None = None, seed: int | None = None) -> Artifact:
        """`policy` trained on completions that it writes itself, step by step, with a KL penalty to `reference`, by
        default `policy`, or with section.anchor=ema to its own average; the weights are `.model`. The scorers of
        data.sources reward it, or `models` in sum: reward models that this run trained, by name. seed: instead of the
        recipe's."""
        r, reference = self.recipe, reference or policy
        check_engine(r.engine, online=True)
        if (size := size_of(r.engine)) > 1:
            raise UserError(f"engine.sequence_parallel={size}: in online training every rank has rows of its own; set "
                            "engine.sequence_parallel=1")
        scoring, files = self._scoring(r.sources) if models is None else self._rewarding(models)
        weights = weights_of(r.sources) if models is None else {s.name: dict.fromkeys(models, 1.0) for s in r.sources}
        config = scoring | self._training(seed, online=section, evaluate=self._checks) | {
            "score": r.score.only("max_errors", "workers"), "weights": weights,
            "shares": {s.name: s.share for s in r.sources}}
        inputs = {"round": self.round, "policy": policy, "prompts": prompts, "files": files}
        if section.beta and section.anchor == "reference":
            inputs |= {"reference": reference, "same_weights": reference.hash == policy.hash}
        return self._stage(name, online, "training", config, inputs, title="online", all_ranks=True)

    def compare(self, prompts: Artifact, samples: Artifact, scores: Artifact, rewards: Artifact, start: Artifact,
                policies: dict[str, Artifact], name: str = "comparison") -> Artifact:
        """KL and wins over one sample of `start`, of its best of n by `rewards` and of the policies. samples: of these
        weights at temperature 1, those of the policies under their names as writers."""
        config = {"weights": weights_of(self.recipe.sources), "model": self._loading, "compute": self._numbers}
        return self._stage(name, compare, "comparison", config, {
            "prompts": prompts, "sample": samples, "scores": scores, "rewards": rewards, "start": start,
            "policies": policies})

    def merge(self, section: Merge, start: Artifact, trained: dict[str, Artifact], name: str = "merge") -> Artifact:
        """The average of checkpoints of `trained` and `start`, as the section says."""
        return self._stage(name, merge, "weights", {"merge": section}, {"start": start, "trained": trained})

    def evaluate(self, section: Evaluate, prompts: Artifact, candidates: dict[str, Artifact],
                 name: str = "evaluate") -> Artifact:
        """Scores on the held-out prompts, of candidates whose weights were not evaluated before."""
        fresh = {a.hash or candidate: candidate for candidate, a in reversed(candidates.items())}
        fresh = {candidate: candidates[candidate] for key, candidate in fresh.items() if key not in self.measured}
        fresh = dict(sorted(fresh.items()))
        start = {"start": self.start} if self.measured else {}
        written = self._stage("held-out" if name == "evaluate" else f"{name}-held-out", held_out, "held-out",
                              {"evaluate": section, "model": self._loading, "compute": self._numbers},
                              {"prompts": prompts, "candidates": fresh} | start, all_ranks=True)
        # written prompts are not held out, and what is said of prompts does not tell candidates apart
        sources = [s.model_copy(update={"scorers": [c for c in s.scorers if not c.of_prompts]})
                   for s in self.recipe.data.sources]
        config, files = self._scoring(sources)
        config |= {"score": self.recipe.score, "weights": weights_of(sources)}
        done = self._stage(name, evaluate, "evaluation", config,
                           {"prompts": prompts, "completions": written, "candidates": fresh, "files": files},
                           all_ranks=True)
        self.measured |= {a.hash: (done, candidate) for candidate, a in fresh.items()}
        return done

    def promote(self, section: Merge, candidates: dict[str, Artifact]) -> Artifact:
        """The best candidate on the validation split by section.promote_on, the later one at a tie; the last candidate
        if section.promote is "last" or nothing was evaluated. Neither takes candidates whose cut share rose by more
        than section.max_cut_rise; the first candidate, with which the round began, always may be taken."""
        evaluations = [self.measured[a.hash][0] for a in candidates.values() if a.hash in self.measured]
        waiting = any(evaluation.hash is None for evaluation in evaluations)  # only while planning
        chosen, refused = list(candidates)[-1], {}
        if len(evaluations) == len(candidates) and not waiting:
            refused = self._refused(section, candidates)
            left = [name for name in candidates if name not in refused]
            chosen = left[-1]
            if section.promote == "best":
                where = [self._measured(candidates[name]) for name in left]
                found = dict(zip(left, merits(section.promote_on, where, "validation"), strict=True))
                chosen = max(reversed(left), key=found.get)
        where = {name: [str(self.measured[a.hash][0].path.relative_to(self.store.run_dir)), self.measured[a.hash][1]]
                 for name, a in candidates.items() if a.hash in self.measured}
        self.promotions.append({"round": self.round, "promoted": chosen, "hash": candidates[chosen].hash,
                                "weights": self._folder(candidates[chosen]), "candidates": where}
                               | ({"refused": refused} if refused else {}))
        if not self.store.planning and self.store.world.first:
            write_json(self.store.run_dir / "promotions.json", self.promotions)
            for name, why in refused.items():
                self.store.console.warn(f"round-{self.round:02}: {name} cannot be promoted: {why}")
            self.store.console.line(f"round-{self.round:02}: promoted {chosen}")
        self.promoted.append(Artifact(candidates[chosen].path, None) if waiting else candidates[chosen])
        return self.promoted[-1]

    def _folder(self, weights: Artifact) -> str | None:
        """The weights' folder in the run directory; None for the start weights."""
        inside = self.store.run_dir in weights.path.parents
        return weights.path.relative_to(self.store.run_dir).as_posix() if inside else None

    def _measured(self, weights: Artifact) -> tuple[Path, str]:
        """(folder of the evaluation of `weights`, candidate in it)"""
        evaluation, candidate = self.measured[weights.hash]
        self.store.verify(evaluation)
        return evaluation.path, candidate

    def _refused(self, section: Merge, candidates: dict[str, Artifact]) -> dict[str, str]:
        """Candidate -> why it cannot be promoted."""
        first, *others = candidates
        began = [candidates[first], *([self.start] if self.start.hash in self.measured else [])]
        lowest = min(self._validation(weights)["cut_share"] for weights in began)
        cut = {name: self._validation(candidates[name])["cut_share"] for name in others
               if candidates[name].hash != candidates[first].hash}
        return {name: f"{share:.1%} of its validation completions are cut by length, {lowest:.1%} before "
                      f"(merge.max_cut_rise={section.max_cut_rise:g})"
                for name, share in cut.items() if share > lowest + section.max_cut_rise}

    def _validation(self, weights: Artifact) -> dict:
        """The results of evaluated weights on the validation split."""
        folder, candidate = self._measured(weights)
        return read_json(folder / "summary.json")[candidate]["validation"]

    def publish(self, weights: Artifact) -> Artifact:
        """A model folder that plain transformers loads, with a model card."""
        self.store.verify([evaluation for evaluation, _ in self.measured.values()])
        scorers = {s.name: [c.model_dump(mode="json") for c in s.scoring] for s in self.recipe.data.sources}
        config = {"recipe": self.recipe, "bootstrap": self.recipe.evaluate.bootstrap, "scorers": scorers,
                  "base": self._about_base}
        final = self._stage("final", publish, "model", config, {"weights": weights, "promotions": self.promotions})
        self.store.verify(final)
        return final


def columns_of(sources: list[Source]) -> dict[str, list[str]]:
    """Source -> its columns, see base.Columns."""
    return {s.name: [s.prompt_column, s.answer_column, s.prompt_template] for s in sources}


def weights_of(sources: list[Source]) -> dict[str, dict[str, float]]:
    """Source -> scorer -> its weight."""
    return {s.name: {c.name: c.weight for c in s.scoring} for s in sources}
