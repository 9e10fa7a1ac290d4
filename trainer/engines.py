"""The sections sample and evaluate: a class per engine, with the keys that this engine has.

A union of them is told apart by the key `engine`, so a key of another engine is unknown.
"""

import re
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from strop.trainer.section import (
    UNKEYED,
    FilePath,
    NotNegative,
    Positive,
    PositiveFloat,
    Section,
    Weight,
    not_zero_in_fp32,
)
from strop.trainer.sharding import Trainer, kind_of


def _server(value: str) -> str:
    try:
        at = urlsplit(value)
        known = at.scheme in ("http", "https") and at.hostname and at.port != 0
    except ValueError:
        known = False
    if not known:
        raise ValueError("must be the address of a server, e.g. http://localhost:8000/v1")
    if at.username or at.password or at.query or at.fragment:
        raise ValueError("must be an address without user, password and parameters; set key_env to the name of the "
                         "environment variable that holds the key")
    return value.rstrip("/")


def _variable(value: str) -> str:
    if not re.fullmatch("[A-Z_][A-Z0-9_]{0,63}", value):  # what is not the name of a variable may be a key
        raise ValueError("must be the name of an environment variable in capitals, not the key itself")
    return value


class InProcess(Section):
    engine: Literal["in_process"] = Field("in_process", description="what writes the completions: in_process (Strop's "
                                          "sampler), vllm (started by Strop for these weights) or openai (a server "
                                          "with OpenAI's protocol)")
    batch_size: Positive = Field(128, description="completions decoded together, on each rank")


class Vllm(Section):
    engine: Literal["vllm"] = Field("vllm", description="vLLM, started for these weights and ended before training")
    python: FilePath | None = Field(None, json_schema_extra=UNKEYED,
                                    description="Python interpreter that has vLLM. Default: the one that runs Strop")
    tensor_parallel_size: Positive = Field(1, le=1024, json_schema_extra=UNKEYED,
                                           description="GPUs per replica; replicas fill the GPUs of the run")
    memory: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, json_schema_extra=UNKEYED, description="share of each GPU's memory for vLLM, on a CPU of the machine's. "
        "Default: 0.85, on a CPU 0.3")
    engine_args: dict[str, Any] = Field({}, description="further arguments of vllm.LLM, e.g. {enforce_eager: true}")


class OpenAI(Section):
    engine: Literal["openai"] = Field("openai", description="a server with OpenAI's protocol: vllm serve, SGLang, "
                                      "llama.cpp, a provider")
    base_url: Annotated[str, AfterValidator(_server)] = Field(
        description="address of the server, e.g. http://localhost:8000/v1")
    model: str = Field(min_length=1, max_length=500, description="name of the model on the server; {weights} is "
                       "replaced by the folder of the weights, for servers that load a model by its folder")
    key_env: Annotated[str, AfterValidator(_variable)] | None = Field(
        None, json_schema_extra=UNKEYED, description="name of the environment variable that holds the server's key. "
        "Default: no key is sent")
    request: dict[str, Any] = Field({}, description="further fields of every request; null leaves one out, e.g. "
                                    "{max_tokens: null, max_completion_tokens: 512}")
    concurrency: Positive = Field(16, le=4096, json_schema_extra=UNKEYED,
                                  description="requests at a time, on each rank")
    timeout: PositiveFloat = Field(600.0, le=86_400, json_schema_extra=UNKEYED,
                                   description="seconds for a complete answer; then the request is sent again")
    retries: NotNegative = Field(8, le=100, json_schema_extra=UNKEYED,
                                 description="further tries of a request after a failure that may pass")
    requests_per_minute: Positive | None = Field(None, json_schema_extra=UNKEYED,
                                                 description="most requests, over all ranks. Default: no limit")
    tokens_per_minute: Positive | None = Field(None, json_schema_extra=UNKEYED, description="most tokens of prompts "
                                               "and completions, over all ranks. Default: no limit")
    budget: Positive | None = Field(None, json_schema_extra=UNKEYED, description="most tokens of prompts and "
                                    "completions that a stage may use, over all ranks; then it stops, and a higher "
                                    "budget resumes it. Default: no limit")
    prompt_price: float = Field(0.0, ge=0.0, json_schema_extra=UNKEYED, description="price of a million prompt tokens")
    completion_price: float = Field(0.0, ge=0.0, json_schema_extra=UNKEYED,
                                    description="price of a million completion tokens")


def tag_key(section: type[Section]) -> str:
    """The key whose value picks this section in a union: engine, or kind of what trains."""
    return "kind" if issubclass(section, Trainer) else "engine"


def engine_of(value: Any) -> str:
    """The tag of a section, or of the data for one, in a union of engines."""
    if isinstance(value, Section):
        return getattr(value, "engine", "models")
    if not isinstance(value, dict):
        return "in_process"
    return "models" if value.get("models") else str(value.get("engine", "in_process"))


def picked(sections: list[type[Section]], data: Any) -> list[type[Section]]:
    """Of the sections in a union, the one that data is for."""
    tag = kind_of(data) if issubclass(sections[0], Trainer) else engine_of(data)
    return [section for section in sections if tag_of(section) == tag]


def sections_of(annotation) -> list[type[Section]]:
    """The sections that a field holds, directly, as one of a union or as entries of a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for kind in get_args(annotation) for section in sections_of(kind)]


def tag_of(section: type[Section]) -> str:
    """The value of `engine_of` or `kind_of` that picks this section."""
    key = tag_key(section)
    return section.model_fields[key].default if key in section.model_fields else "models"


def spoken(section: type[Section]) -> str:
    """What picks this section, as an error says it."""
    return "models" if tag_of(section) == "models" else f"{tag_key(section)}={tag_of(section)}"


class Writer(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
                      description="name of the writer in tables, reports and the folder of its completions")
    share: Weight = Field(1.0, description="this writer's weight in the division of sample.k")


class LocalWriter(Writer):
    weights: Literal["current", "start"] | Annotated[str, Field(pattern=r"^round-[0-9]{2,3}$")] = Field(
        "current", description="weights of this run: current (of the round), start, or those that a round promoted, "
        "e.g. round-00; the writer takes part once there are such weights")
    path: FilePath | None = Field(None, json_schema_extra=UNKEYED, description="instead of weights: another model, "
                                  "named as in model.path")  # its content counts, as an input of the stage

    @model_validator(mode="after")
    def one_origin(self):
        if self.path is not None and "weights" in self.model_fields_set and self.weights != "current":
            raise ValueError("name one of weights and path")
        return self


class InProcessWriter(LocalWriter, InProcess):
    pass


class VllmWriter(LocalWriter, Vllm):
    pass


class OpenAIWriter(Writer, OpenAI):
    pass


AnyWriter = Annotated[Annotated[InProcessWriter, Tag("in_process")] | Annotated[VllmWriter, Tag("vllm")]
                      | Annotated[OpenAIWriter, Tag("openai")], Discriminator(engine_of)]


WRITERS: dict[str, type[Writer]] = {"in_process": InProcessWriter, "vllm": VllmWriter, "openai": OpenAIWriter}


class Sampling(Section):
    prompts: Positive = Field(128, description="prompts per round")
    k: Positive = Field(8, le=100_000, description="completions per prompt")
    temperature: Annotated[float, AfterValidator(not_zero_in_fp32)] = Field(1.0, ge=0.0, le=10.0,
                                                                             description="0 is greedy")
    top_k: NotNegative = Field(0, description="0 is off")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="1 is off")
    max_new_tokens: Positive = Field(64, description="most tokens of a completion, end of turn included")
    shard_prompts: Positive = Field(32, description="prompts per shard, the unit of resume and of determinism; at "
                                    "most this many times k completions are decoded together")
    enough: Positive | None = Field(None, description="correct completions of a prompt after which a writer draws no "
                                    "more of it; this raises pass rates. Default: all k are drawn")


class Sample(Sampling, InProcess):
    pass


class SampleVllm(Sampling, Vllm):
    pass


class SampleOpenAI(Sampling, OpenAI):
    pass


class SampleModels(Sampling):
    models: list[AnyWriter] = Field(min_length=1, max_length=100, description="several writers, instead of engine: "
                                    "each gets its share of k")

    @model_validator(mode="after")
    def agree(self):
        names = [writer.name for writer in self.models]
        if len(set(names)) != len(names):
            raise ValueError(f"two writers share a name ({', '.join(names)}); give each its own")
        if self.k < len(names):
            raise ValueError(f"k={self.k} completions cannot be divided among {len(names)} models; raise it")
        return self


AnySample = Annotated[Annotated[Sample, Tag("in_process")] | Annotated[SampleVllm, Tag("vllm")]
                      | Annotated[SampleOpenAI, Tag("openai")] | Annotated[SampleModels, Tag("models")],
                      Discriminator(engine_of)]


PRINCIPLES = [
    "It helps with what was asked, completely and correctly, and does not claim what it cannot know.",
    "It gives no help with what would hurt people, and says so plainly and politely where that is asked.",
    "It respects people: nothing insulting, demeaning or prejudiced.",
    "It is as short and clear as the question allows, without repetition, flattery or lectures.",
]
CRITIQUES = {
    "principles": "Check your last answer against this principle: {feedback}\n\nName, briefly and specifically, where "
                  "it falls short of the principle. If nothing does, say so. Do not rewrite it yet.",
    "errors": "Your last answer was tested, and it failed:\n\n{feedback}\n\nExplain briefly what in it causes this. Do "
              "not rewrite it yet.",
}
REVISION = ("Rewrite your answer so that it has none of these faults, and keep what was right in it. Reply with the "
            "new answer alone, as if it were your first one.")


class Revising(Section):
    feedback: Literal["principles", "errors"] = Field("principles", description="what a completion is criticized by: a "
                                                      "principle, or what its scorers said (errors); errors revises "
                                                      "only completions that are not correct")
    principles: list[str] = Field(PRINCIPLES, min_length=1, description="each step takes the next one")
    critique: str | None = Field(None, description="the turn that asks for a critique of the answer before it; "
                                 "{feedback} is replaced. Default: a text for each kind of feedback")
    revision: str = Field(REVISION, min_length=1, description="the turn behind the critique that asks for the new "
                          "answer; {feedback} is replaced")
    times: Positive = Field(1, le=100, description="critiques and revisions of a completion, one after another")
    per_prompt: Positive = Field(1, description="completions of a prompt that are revised, the first ones")
    temperature: Annotated[float, AfterValidator(not_zero_in_fp32)] = Field(1.0, ge=0.0, le=10.0,
                                                                             description="0 is greedy")
    top_k: NotNegative = Field(0, description="0 is off")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="1 is off")
    max_new_tokens: Positive = Field(256, description="most tokens of a critique, and of a revision")
    shard_prompts: Positive = Field(32, description="prompts per shard, the unit of resume and of determinism")

    @model_validator(mode="after")
    def agree(self):
        if self.critique is None:
            self.critique = CRITIQUES[self.feedback]
        if "{feedback}" not in self.critique:
            raise ValueError("critique must contain {feedback}")
        if self.feedback == "errors" and self.times > 1:
            raise ValueError(f"times={self.times} with feedback=errors: a revision has no errors before it is scored; "
                             "set times=1, score the revisions and revise those")
        if self.feedback == "errors" and self.principles != PRINCIPLES:
            raise ValueError("principles is not read with feedback=errors; leave it out")
        return self


class Revise(Revising, InProcess):
    pass


class ReviseVllm(Revising, Vllm):
    pass


class ReviseOpenAI(Revising, OpenAI):
    pass


AnyRevise = Annotated[Annotated[Revise, Tag("in_process")] | Annotated[ReviseVllm, Tag("vllm")]
                      | Annotated[ReviseOpenAI, Tag("openai")], Discriminator(engine_of)]


class Evaluating(Section):
    max_new_tokens: Positive = Field(64, description="most tokens of a completion")
    bootstrap: Positive = Field(10_000, le=1_000_000, json_schema_extra=UNKEYED,
                                description="resamples of the paired bootstrap interval")


class EvaluateWeights(Evaluating):
    kl_prompts: NotNegative = Field(16, description="held-out prompts for the KL to the start weights; 0 is off")


class Evaluate(EvaluateWeights, InProcess):
    pass


class EvaluateVllm(EvaluateWeights, Vllm):
    pass


class EvaluateOpenAI(Evaluating, OpenAI):
    pass


AnyEvaluate = Annotated[Annotated[Evaluate, Tag("in_process")] | Annotated[EvaluateVllm, Tag("vllm")]
                        | Annotated[EvaluateOpenAI, Tag("openai")], Discriminator(engine_of)]
