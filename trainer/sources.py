"""The keys of data: prompt sources, and ready-made data."""

from typing import Any, Literal

from pydantic import Field, model_validator

from strop.trainer.scorers import Rule, Scorer
from strop.trainer.section import UNKEYED, FilePath, NotNegative, Positive, Section, Weight


class Source(Section):
    name: str = Field(description="name of the source in tables and reports")
    path: FilePath | None = Field(None, description="prompts: a .jsonl or .parquet file, a saved `datasets` folder, or "
                                  "a dataset of the Hugging Face hub as hf:owner/name[/config][@revision][:split], "
                                  "split train by default")
    reasoning_gym: str | None = Field(None, description="instead of path: name of a reasoning-gym dataset")
    reasoning_gym_config: dict[str, Any] = Field({}, description="keyword arguments of that dataset")
    size: Positive = Field(2000, le=10_000_000, description="reasoning_gym: entries to generate before deduplication")
    prompt_column: str = Field("prompt", description="column with the prompt: a string or a list of messages")
    answer_column: str = Field("answer", description="column with the true answer")
    system_prompt: str | None = Field(None, description="system message put before every prompt of this source")
    ignore_columns: list[str] = Field([], description="columns that are not to be read; others become metadata, but "
                                      "for those that mean something elsewhere (messages, images, weight, ...)")
    prompt_template: str = Field("{prompt}", description="text of the user turn; {prompt} is replaced by the prompt, "
                                 "{choices} by the options, {NAME} by the row's column NAME")
    verifier: Rule | None = Field(None, json_schema_extra=UNKEYED, description="short for a single scorer that is a "
                                  "rule. Default: reasoning_gym for reasoning_gym sources without scorers")
    verifier_args: dict[str, Any] = Field({}, json_schema_extra=UNKEYED, description="its args")
    scorers: list[Scorer] = Field([], json_schema_extra=UNKEYED, description="what scores a completion; the score is "
                                  "the sum of their values by weight")
    share: Weight = Field(1.0, description="this source's weight in every round's draw of prompts")
    templated: bool | None = Field(None, description="the prompts come from templates: keep near duplicates, and "
                                   "drop only exact copies of its own held-out prompts. Default: true for "
                                   "reasoning_gym, else false")

    @model_validator(mode="after")
    def one_origin(self):
        if (self.path is None) == (self.reasoning_gym is None):
            raise ValueError("name exactly one of path and reasoning_gym")
        if self.scorers and (self.verifier or self.verifier_args):
            raise ValueError("verifier is short for a single scorer; with scorers leave out verifier and verifier_args")
        if self.verifier is None and self.reasoning_gym is None and not self.scorers:
            raise ValueError("verifier is missing: a source read from a file needs one, or scorers")
        for scorer in self.scoring:
            if scorer.rule == "reasoning_gym" and self.reasoning_gym is None and "dataset" not in scorer.args:
                key = "args" if self.scorers else "verifier_args"
                raise ValueError(f"verifier reasoning_gym on a file needs {key}.dataset, the name of its dataset")
        names = [scorer.name for scorer in self.scorers]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise ValueError(f"scorers: two are named {twice}; give each its own name")
        if self.scorers and not any(scorer.weight for scorer in self.scorers):
            raise ValueError("scorers: every weight is 0, so there is no score; give one a weight")
        if "{prompt}" not in self.prompt_template:
            raise ValueError("prompt_template must contain {prompt}")
        if self.templated is None:
            self.templated = self.reasoning_gym is not None
        return self

    @property
    def scoring(self) -> list[Scorer]:
        """The scorers, also where the recipe has the short form."""
        return self.scorers or [Scorer(rule=self.verifier or "reasoning_gym", args=self.verifier_args)]

    @property
    def topic(self) -> str | None:
        """The name of the scorer that tells the topic, the first one."""
        return next((scorer.name for scorer in self.scoring if scorer.judge and scorer.judge.mode == "topic"), None)


class ReadyData(Section):
    name: str = Field(description="name of the data in tables and reports")
    path: FilePath = Field(description=".jsonl or .parquet file, saved `datasets` folder, or hf:owner/name as in "
                           "sources, with TRL's columns")
    rounds: list[NotNegative] | Literal["all"] = Field("all", description="rounds that use it, counted from 0")
    weight: Weight = Field(1.0, description="times a row is seen per epoch; 0.5 draws half of the rows")
    near_duplicates: bool = Field(True, description="drop rows that nearly repeat earlier ones of this file")
    ignore_columns: list[str] = Field([], description="columns that are not to be read; any other one that has no "
                                      "meaning here is an error")

    def used_in(self, round: int, so_far: bool = False) -> bool:
        """Whether a round uses it, with so_far also if an earlier round did."""
        return self.rounds == "all" or any(r == round or (so_far and r < round) for r in self.rounds)


class Data(Section):
    sources: list[Source] = Field([], description="where prompts come from")
    validation: Positive = Field(100, description="prompts of the validation split (promotion decides on it)")
    test: Positive = Field(200, description="prompts of the test split (only reports see it)")
    sft: list[ReadyData] = Field([], description="ready SFT data: messages, or prompt + completion")
    preferences: list[ReadyData] = Field([], description="ready preference data: prompt + chosen + rejected; for "
                                         "dpo.loss=kto and bco also prompt + completion + label (true if it is "
                                         "desirable), for listwise also prompt + completions + scores, or ranks from 1")
    max_bad_rows: NotNegative = Field(0,
                                      description="malformed rows per file that are quarantined and counted; more "
                                      "stop the run")
