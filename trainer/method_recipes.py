"""The recipes of the methods beside `rounds`: the keys that a method adds, its defaults, and the keys it does not have.

`RECIPES` has the class of each method. A default that differs from that of `rounds` is in DEFAULTS.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_serializer, model_validator

from strop.trainer.config import Checked, Dpo, Recipe, Reward, Sft, Train
from strop.trainer.engines import AnyRevise, AnySample, Revise, Sample, SampleModels, sections_of
from strop.trainer.section import UNKEYED, NotNegative, Positive, PositiveFloat, Section, Share

MERGING = ("merge.method", "merge.members", "merge.weights", "merge.t", "merge.interpolate")  # those of a round


class MethodRecipe(Recipe):
    """A recipe whose method has other defaults, keys and stages than `rounds`."""

    DEFAULTS: ClassVar[dict[str, Any]] = {}
    UNREAD: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def of_the_method(cls, data):
        if not isinstance(data, dict):
            return data
        method = cls.model_fields["method"].default
        for key in cls.UNREAD:
            if _below(data, key):
                others = [name for name, recipe in RECIPES.items() if has_key(recipe, key.split("."))]
                raise ValueError(f"{key} is not read by method {method}; leave it out, or set method="
                                 f"{' or method='.join(others)}")
        data = dict(data)
        for key, value in cls.DEFAULTS.items():
            section, _, name = key.rpartition(".")
            if not section:
                data.setdefault(name, value)
            elif isinstance(data.setdefault(section, {}), dict):
                data[section] = {name: value} | data[section]
        return data

    @model_serializer(mode="wrap")
    def without_unread(self, handler):
        found = handler(self)
        for key in self.UNREAD:
            section, _, name = key.rpartition(".")
            (found.get(section, {}) if section else found).pop(name, None)
        return found


def _below(data: dict, key: str) -> bool:
    """Whether a tree has the dotted key."""
    for part in key.split("."):
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True


class PromptedRecipe(MethodRecipe):
    """A method that samples, so that ready data alone is not enough."""

    @model_validator(mode="after")
    def has_prompts(self):
        if not self.data.sources:
            raise ValueError(f"data.sources is empty, but method={self.method} samples completions of prompts: name at "
                             "least one source")
        return self

    def _needs_pairs(self) -> None:
        if self.dpo.rows != "pairs":
            raise ValueError(f"dpo.loss={self.dpo.loss} needs no pairs, but other stages of method {self.method} learn "
                             "from those that are selected; set a loss of pairs")

    def _names_other_writers(self) -> bool:
        return isinstance(self.sample, SampleModels) or "{weights}" not in getattr(self.sample, "model", "{weights}")

    def _check_names(self, key: str, names: list[str], *known: list) -> None:
        there = [entry.name for entries in known for entry in entries]
        if unknown := next((name for name in names if name not in there), None):
            raise ValueError(f"{key} names {unknown}; there are {', '.join(there)}")


class RewardRecipe(MethodRecipe):
    method: Literal["reward"] = Field("reward", description="a reward model, of ready-made pairs or of scored "
                                      "completions of the start weights")
    rounds: Literal[1] = Field(1, description="always one round of sample, score, select and reward")
    reward: Reward = Field(Reward(), description="training the reward model")

    UNREAD = ("sft", "dpo", "merge", "evaluate", "write_prompts")


class Variant(Section):
    lr: PositiveFloat | None = Field(None, description="peak learning rate of this run. Default: the stage's")
    seed: NotNegative | None = Field(None, description="seed of this run's order of the data. Default: the recipe's")
    mix: dict[str, Annotated[float, Field(ge=0.0, le=1e6)]] = Field(
        {}, description="factors of this run's rows, by source or ready data, e.g. {maths: 2, chat: 0}; others are 1")


class Average(Section):
    reward: list[Variant] = Field([Variant(), Variant(seed=1)], min_length=1, max_length=100,
                                  description="runs of the reward model's training")
    sft: list[Variant] = Field([Variant(), Variant(seed=1)], min_length=1, max_length=100, description="runs of SFT")
    dpo: list[Variant] = Field([Variant(), Variant(seed=1)], min_length=1, max_length=100, description="runs of DPO")


class AnnotatedRecipe(PromptedRecipe):
    """A method in which the scorers of data.sources annotate a few answers, and a reward model learns from that."""

    annotate: AnySample = Field(Sample(k=2), description="answers to each prompt that the scorers of data.sources "
                                "compare, as annotators do")
    reward: Reward = Field(Reward(), description="training the reward model")

    @model_validator(mode="after")
    def has_pairs(self):
        if self.annotate.k < 2:
            raise ValueError(f"annotate.k={self.annotate.k}: a comparison takes 2 answers to a prompt; raise it")
        self._needs_pairs()
        return self


class Llama3Recipe(AnnotatedRecipe):
    method: Literal["llama3"] = Field("llama3", description="Llama 3 (2407.21783, section 4): reward model and SFT "
                                      "from the start weights in every round, best of K by the reward model, DPO on "
                                      "the newest pairs")
    average: Average = Field(Average(), description="runs of each training stage, whose weights are averaged; [{}] is "
                             "one run, without an average")
    revise: AnyRevise | None = Field(None, description="edits of the chosen answers, ranked above them unless the "
                                     "scorers say that they are worse. Default: none")

    DEFAULTS: ClassVar = {"rounds": 6, "annotate.k": 2, "sample.k": 10, "reward.pairs": "all", "dpo.lr": 1e-5,
                          "dpo.nll_weight": 0.2}
    UNREAD = ("write_prompts", "reward.margin", "sft.enabled", "sft.start", "dpo.enabled", "dpo.reference", "dpo.pairs",
              *MERGING)

    @model_validator(mode="after")
    def has_mixed_data(self):
        for stage, ready in (("reward", self.data.preferences), ("sft", self.data.sft), ("dpo", self.data.preferences)):
            for i, variant in enumerate(getattr(self.average, stage)):
                self._check_names(f"average.{stage}.{i}.mix", list(variant.mix), self.data.sources, ready)
                if not any(variant.mix.get(entry.name, 1.0) for entry in (*self.data.sources, *ready)):
                    raise ValueError(f"average.{stage}.{i}.mix={variant.mix} leaves no data to learn from; give a "
                                     "factor above 0")
        return self

    def runs(self, stage: str) -> list[tuple[Train, dict[str, Any]]]:
        """(section, name, seed and mix) of each run of reward, sft or dpo."""
        section, variants = getattr(self, stage), getattr(self.average, stage)
        return [(section if variant.lr is None else section.model_copy(update={"lr": variant.lr}),
                 {"name": stage if len(variants) == 1 else f"{stage}-{i}", "seed": variant.seed, "mix": variant.mix})
                for i, variant in enumerate(variants)]


class Safety(Section):
    sources: list[str] = Field([], description="names of the data.sources whose prompts are about safety")
    preferences: list[str] = Field([], description="names of the data.preferences whose pairs are about safety")
    threshold: Share = Field(0.15, description="sigmoid of the safety reward below which an answer counts by it, "
                             "whatever its prompt is about")


class Llama2Recipe(AnnotatedRecipe):
    method: Literal["llama2"] = Field("llama2", description="Llama 2 (2307.09288, section 3): two reward models with "
                                      "margins, SFT on each prompt's best answer of all rounds")
    safety: Safety = Field(Safety(), description="what the second reward model learns and decides")

    DEFAULTS: ClassVar = {
        "rounds": 5, "annotate.k": 2, "sample.k": 10, "reward.margin": 1.0, "reward.min_lr_ratio": 0.1,
        "reward.warmup_ratio": 0.03, "reward.batch_size": 512, "reward.centering": 0.01, "sft.lr": 2e-5,
        "sft.weight_decay": 0.1, "sft.batch_size": 64, "sft.epochs": 2, "merge.promote": "last"}
    UNREAD = ("write_prompts", "dpo", "reward.pairs", "select.accumulate", "sft.enabled", "sft.start", *MERGING)

    @model_validator(mode="after")
    def has_both_kinds(self):
        self._check_names("safety.sources", self.safety.sources, self.data.sources)
        self._check_names("safety.preferences", self.safety.preferences, self.data.preferences)
        about = {True: 0, False: 0}
        for entries, names in ((self.data.sources, self.safety.sources),
                               (self.data.preferences, self.safety.preferences)):
            for entry in entries:
                about[entry.name in names] += 1
        if not all(about.values()):
            missing = "safety" if about[False] else "helpfulness"
            raise ValueError(f"safety.sources={self.safety.sources} and safety.preferences={self.safety.preferences} "
                             f"leave no data about {missing}, which a reward model of its own learns")
        return self

    @property
    def about(self) -> dict[str, list[str]]:
        """{reward model: names of the sources and ready-made pairs it learns from}"""
        safe = [*self.safety.sources, *self.safety.preferences]
        names = [entry.name for entry in (*self.data.sources, *self.data.preferences)]
        return {"helpfulness": [name for name in names if name not in safe], "safety": safe}


class CodeSft(Sft):
    sources: list[str] = Field([], json_schema_extra=UNKEYED, description="names of the data.sources and data.sft that "
                               "this stage learns from")  # these two decide what is selected, which counts
    replay: Share = Field(0.02, json_schema_extra=UNKEYED,
                          description="share of these rows that the general stage sees again")


class Rpo(Dpo):
    loss: Literal["rpo"] = Field("rpo", description="always: aims at the difference in score")


class NemotronRecipe(PromptedRecipe):
    method: Literal["nemotron"] = Field("nemotron", description="Nemotron-4 340B (2406.11704, section 3): SFT on code, "
                                        "then on the rest, DPO, and rounds of RPO")
    code: CodeSft = Field(CodeSft(), description="the first SFT stage; sft is the second one")
    rpo: Rpo = Field(Rpo(), description="reward-aware preference optimization, from and against the weights so far")

    DEFAULTS: ClassVar = {
        "rounds": 5, "merge.promote": "last", "code.lr": 3e-7, "code.schedule": "constant", "code.batch_size": 128,
        "sft.lr": 3e-7, "sft.batch_size": 128, "sft.epochs": 3, "dpo.lr": 3e-7, "dpo.schedule": "constant",
        "dpo.batch_size": 256, "dpo.beta": 1e-3, "dpo.nll_weight": 1e-4, "dpo.nll_normalization": "sequence_sum",
        "dpo.mask_template_tokens": False, "rpo.lr": 3e-7, "rpo.schedule": "constant", "rpo.batch_size": 256,
        "rpo.beta": 5e-3, "rpo.nll_weight": 1e-5, "rpo.nll_normalization": "sequence_sum",
        "rpo.mask_template_tokens": False}
    UNREAD = ("code.start", "sft.enabled", "sft.start", "dpo.enabled", "dpo.reference", "dpo.pairs", "rpo.enabled",
              "rpo.reference", "rpo.pairs", *MERGING)

    @model_validator(mode="after")
    def has_code(self):
        self._needs_pairs()
        self._check_names("code.sources", self.code.sources, self.data.sources, self.data.sft)
        if self.code.enabled and not self.code.sources:
            raise ValueError("code.sources is empty: name the data.sources and data.sft about code, or set "
                             "code.enabled=false")
        if self.rounds < 3:
            raise ValueError(f"rounds={self.rounds}: round 0 is SFT, round 1 DPO, and RPO takes those after it; set 3 "
                             "or more")
        for kind, entries, unread in (("sft", self.data.sft, range(1, self.rounds)),
                                      ("preferences", self.data.preferences, range(1))):
            for i, entry in enumerate(entries):
                if entry.rounds != "all" and (wrong := [r for r in entry.rounds if r in unread]):
                    raise ValueError(f"data.{kind}.{i}.rounds={entry.rounds}: round {wrong[0]} of method nemotron "
                                     f"trains on no {'SFT rows' if kind == 'sft' else 'pairs'}; leave it out")
        return self

    @property
    def code_mix(self) -> dict[str, float]:
        """{source or ready data: factor of its rows' weights} of the first SFT stage."""
        return dict.fromkeys(self.code.sources, 1.0)

    @property
    def general_mix(self) -> dict[str, float]:
        """As code_mix, of the second stage, or of the only one."""
        mix = {entry.name: 1.0 for entry in (*self.sources, *self.data.sft)}
        if self.code.enabled:
            mix |= dict.fromkeys(self.code.sources, self.code.replay)
        return {name: factor for name, factor in mix.items() if factor}


class ConstitutionalRecipe(PromptedRecipe):
    method: Literal["constitutional"] = Field("constitutional", description="Constitutional AI (2212.08073): SFT on "
                                              "revised answers, then DPO on pairs that a model judges")
    rounds: Literal[1] = Field(1, description="always one")
    revise: AnyRevise = Field(Revise(), description="critiques and revisions of the start weights' answers by the "
                              "principles of a constitution")

    DEFAULTS: ClassVar = {"revise.times": 4}
    UNREAD = ("merge", "write_prompts", "sft.enabled", "sft.start", "dpo.enabled", "dpo.pairs", "select.accumulate",
              "revise.feedback")

    @model_validator(mode="after")
    def samples_its_weights(self):
        if self._names_other_writers():
            raise ValueError("method=constitutional samples its own weights, but sample names other writers; use "
                             "sample.engine in_process or vllm")
        return self


class SelfDistillRecipe(PromptedRecipe):
    method: Literal["self_distill"] = Field("self_distill", description="rounds of SFT and DPO on the model's own "
                                            "corrections of what it got wrong")
    revise: AnyRevise = Field(Revise(), description="corrections of completions that are not correct, by what their "
                              "scorers said")

    DEFAULTS: ClassVar = {"revise.feedback": "errors", "revise.per_prompt": 4}
    UNREAD = ("write_prompts", "dpo.pairs", "revise.principles", "revise.times")

    @model_validator(mode="after")
    def by_errors(self):
        if self.revise.feedback != "errors":
            raise ValueError("revise.feedback=principles: method self_distill corrects errors; leave it out, or set "
                             "method=constitutional")
        return self


class BestOfNRecipe(PromptedRecipe):
    method: Literal["best_of_n"] = Field("best_of_n", description="scored samples of the start weights and nothing "
                                         "trained; strop best-of shows what the best of n is worth")
    rounds: Literal[1] = Field(1, description="always one")

    DEFAULTS: ClassVar = {"sample.k": 32}
    UNREAD = ("sft", "dpo", "merge", "evaluate", "write_prompts", "select.accumulate")


class Online(Checked):
    steps: Positive = Field(100, description="steps of sampling, scoring and training; each trains epochs times")
    batch_size: Positive = Field(16, description="prompts per step, over all ranks")
    k: int = Field(4, ge=2, le=100_000, description="completions per prompt")
    epochs: Positive = Field(1, le=1000, description="optimizer steps on a step's completions; more than one needs "
                             "loss=mdloo, which limits how far they move the policy")
    loss: Literal["mdloo", "rloo", "sigmoid", "ipo", "hinge"] = Field(
        "mdloo", description="mdloo (Apple) and rloo: policy gradients with leave-one-out advantages; sigmoid (DPO), "
        "ipo and hinge: online pairs of a prompt's best and worst completion (OAIF)")
    beta: float = Field(0.05, ge=0.0, le=1e6, description="weight of the KL penalty to the reference; of pairs as in "
                        "dpo. 0 needs no reference, and is for mdloo and rloo only")
    anchor: Literal["reference", "ema"] = Field(
        "reference", description="weights that the KL penalty is to: the reference, as a rule those that the stage "
        "starts from, or the EMA of the weights in training (WARP), which needs ema_decay; 0.99 is WARP's")
    mirror_weight: float = Field(1.0, ge=0.0, le=1e6, description="mdloo: weight of the KL to the policy that wrote "
                                 "the step's completions; it acts from the second of epochs on")
    missing_eos_penalty: float = Field(1.0, ge=0.0, le=1e6, description="what a completion's reward loses if it is cut "
                                       "by length")
    max_new_tokens: Positive = Field(64, description="most tokens of a completion, end of turn included")
    temperature: PositiveFloat = Field(1.0, le=10.0, description="of sampling; other than 1 with pairs only: a policy "
                                       "gradient trains the distribution that it samples")
    decode_batch: Positive = Field(128, description="completions decoded together, on each rank")
    lr: PositiveFloat = Field(1e-6, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("constant",
                                                              description="of the learning rate after the warm-up")
    checkpoint_steps: Positive = Field(10, json_schema_extra=UNKEYED, description="optimizer steps between resume "
                                       "points; completions of later steps are kept and not sampled again")
    max_kl: PositiveFloat | None = Field(1.0, description="a check fails if the KL of the start weights to the "
                                         "current ones is above this, in nats per token; null: no limit")

    @property
    def pairs(self) -> bool:
        """Whether the loss is one of pairs."""
        return self.loss not in ("mdloo", "rloo")

    @property
    def longest(self) -> int:
        """Most completion tokens that must fit beside a prompt in a microbatch."""
        return self.max_new_tokens * (2 if self.pairs else 1)

    @model_validator(mode="after")
    def agree(self):
        if self.loss != "mdloo":
            if self.epochs > 1:
                raise ValueError(f"epochs={self.epochs} with loss={self.loss}: after one step the completions are no "
                                 "longer the policy's; set epochs=1, or loss=mdloo")
            if self.mirror_weight != type(self).model_fields["mirror_weight"].default:
                raise ValueError("mirror_weight is read with loss=mdloo only; leave it out, or set loss=mdloo")
        if not self.pairs and self.temperature != 1:
            raise ValueError(f"temperature={self.temperature:g} with loss={self.loss}, which trains the distribution "
                             "that it samples; leave it out")
        if self.pairs and not self.beta:
            raise ValueError(f"beta=0 with loss={self.loss}, which needs a weight above 0; 0.1 is usual")
        if self.anchor == "ema" and not (self.ema_decay and self.beta):
            raise ValueError("anchor=ema is the EMA of ema_decay as the reference of beta; set both above 0")
        if self.max_tokens <= self.longest:
            raise ValueError(f"max_tokens={self.max_tokens} holds no prompt with {2 if self.pairs else 1} of max_new_"
                             f"tokens={self.max_new_tokens}; raise it")
        return self


class OnlineRecipe(PromptedRecipe):
    """A method with a stage of online training."""

    online: Online = Field(Online(), description="training on completions of the weights in training")


class CommitteeRecipe(OnlineRecipe):
    method: Literal["committee"] = Field("committee", description="Apple's iTeC and MDLOO (2407.21075, section 4): the "
                                         "models of SFT, DPO and online RL write the next round's data")

    DEFAULTS: ClassVar = {"online.epochs": 2}
    UNREAD = ("write_prompts", "dpo.pairs", *MERGING)

    @model_validator(mode="after")
    def has_its_own_writers(self):
        if self._names_other_writers():
            raise ValueError("sample names other writers, but the committee's own models write; name an engine")
        if self.sample.k < 4:
            raise ValueError(f"sample.k={self.sample.k} completions cannot be divided among a committee of up to 4 "
                             "models; raise it")
        return self


class OnlineDpoRecipe(OnlineRecipe):
    method: Literal["online_dpo"] = Field("online_dpo", description="online AI feedback (2402.04792): DPO on pairs "
                                          "that the weights in training write")
    rounds: Literal[1] = Field(1, description="always one stage of online training")

    DEFAULTS: ClassVar = {"online.loss": "sigmoid", "online.k": 2, "online.beta": 0.1, "online.temperature": 0.9}
    UNREAD = ("sample", "select", "sft", "dpo", "write_prompts", "data.sft", "data.preferences", "online.enabled",
              *MERGING)

    @model_validator(mode="before")
    @classmethod
    def has_pairs(cls, data):
        online = data.get("online") if isinstance(data, dict) else None
        if isinstance(online, dict) and online.get("loss") in ("mdloo", "rloo"):
            raise ValueError(f"online.loss={online['loss']} is no loss of pairs; set sigmoid, ipo or hinge, or method="
                             "committee")
        return data


class WarpRecipe(OnlineRecipe):
    method: Literal["warp"] = Field("warp", description="WARP (2406.16768): two online runs anchored to their own "
                                    "averages, merged and drawn back towards their start, in every round")

    DEFAULTS: ClassVar = {"online.loss": "rloo", "online.anchor": "ema", "online.ema_decay": 0.99,
                          "merge.method": "warp", "merge.interpolate": 0.3, "merge.promote": "last"}
    UNREAD = ("sample", "select", "sft", "dpo", "write_prompts", "data.sft", "data.preferences", "online.enabled",
              "merge.method", "merge.members", "merge.weights")


class InstructGptRecipe(AnnotatedRecipe, OnlineRecipe):
    method: Literal["instructgpt"] = Field("instructgpt", description="InstructGPT (2203.02155): SFT, a reward model, "
                                           "online training against it, and its policy beside the best of n")
    rounds: Literal[1] = Field(1, description="always one")
    compare: Sample = Field(Sample(k=32), description="answers to test prompts at temperature 1, half of them by the "
                            "SFT weights and half by the policy, for the comparison")

    DEFAULTS: ClassVar = {
        "annotate.k": 4, "compare.k": 32, "sft.lr": 9.65e-6, "reward.pairs": "all", "reward.lr": 9e-6,
        "reward.min_lr_ratio": 0.1, "reward.batch_size": 64, "online.loss": "rloo", "online.beta": 0.02}
    UNREAD = ("write_prompts", "dpo", "sft.enabled", "sft.start", "select.accumulate", "online.enabled", *MERGING,
              *(f"compare.{key}" for key in ("temperature", "top_k", "top_p", "enough")))

    @model_validator(mode="after")
    def has_best_of_two(self):
        if self.compare.k < 6:
            raise ValueError(f"compare.k={self.compare.k}: half of them are the SFT weights', and wins of the best of "
                             "2 over another one take 3; set 6 or more")
        return self


# the keys of each method
RECIPES: dict[str, type[Recipe]] = {"rounds": Recipe, "reward": RewardRecipe, "llama3": Llama3Recipe,
                                    "llama2": Llama2Recipe, "nemotron": NemotronRecipe,
                                    "constitutional": ConstitutionalRecipe, "self_distill": SelfDistillRecipe,
                                    "best_of_n": BestOfNRecipe, "committee": CommitteeRecipe,
                                    "online_dpo": OnlineDpoRecipe, "instructgpt": InstructGptRecipe,
                                    "warp": WarpRecipe}


def recipe_class(data: dict) -> type[Recipe]:
    """The class of a recipe's data by its method; that of `rounds` if there is no such method."""
    method = data.get("method", "rounds")
    return RECIPES.get(method if isinstance(method, str) else "", Recipe)


def recipe_of(config: dict) -> Recipe:
    """The recipe of a run from its config.yaml."""
    if config.get("method") == "llama3" and "annotate" not in config:  # method rounds once had the name llama3
        config = config | {"method": "rounds"}
    return recipe_class(config).model_validate(config)


def has_key(recipe: type[Recipe], key: list) -> bool:
    """Whether a method has the key, given by its parts: names, and places in lists."""
    names = [part for part in key if not isinstance(part, int)]
    unread = getattr(recipe, "UNREAD", ())
    if any(".".join(names[:n]) in unread for n in range(1, len(names) + 1)):
        return False
    sections = [recipe]
    for name in names:
        found = [section.model_fields[name] for section in sections if name in section.model_fields]
        if not found:
            return False
        sections = [inner for field in found for inner in sections_of(field.annotation)]
    return True
