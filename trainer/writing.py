"""The section write_prompts: a class per engine, as in engines.py."""

from typing import Annotated

from pydantic import Discriminator, Field, Tag, model_validator

from strop.trainer.engines import InProcess, OpenAI, Vllm, engine_of
from strop.trainer.scorers import Scorer
from strop.trainer.section import UNKEYED, FilePath, Positive, PositiveFloat, Section, Weight

PLAIN_TEMPLATE = """\
Here are examples of prompts:

{examples}

Write one new prompt of the same kind and in the same form. It must differ from every example in what it asks, and be \
complete by itself. Topic: {topic}.

{format}"""


class Writing(Section):
    enabled: bool = Field(False, description="before each round's sampling, have a model write new training prompts")
    name: str = Field("written", min_length=1, max_length=100, description="name of their source in tables and reports")
    source: str | None = Field(None, description="name of the source whose training prompts are the examples, and "
                               "whose template, system prompt and scorers the new prompts get. Default: the only one")
    prompts: Positive = Field(64, description="new prompts wanted per round")
    asks: Positive = Field(256, le=1_000_000, description="most prompts that the model is asked for per round; those "
                           "that the filters drop are asked for again until then")
    examples: Positive = Field(3, le=100, description="training prompts shown in each ask")
    topics: list[Annotated[str, Field(min_length=1)]] = Field(
        ["a subject of your choice"], min_length=1, description="each ask names one of them, drawn at random")
    template: str = Field(PLAIN_TEMPLATE, description="text of an ask: {examples}, {topic}, and {format}, which says "
                          "how to reply so that prompt and answer can be read")
    votes: Positive = Field(5, le=1000, description="where a rule needs the true answer: times that the model solves "
                            "its prompt; more than half must give the answer that it wrote")
    min_tokens: Positive = Field(4, description="fewest tokens of a new prompt")
    max_tokens: Positive = Field(512, description="most tokens of a new prompt")
    share: Weight = Field(1.0, description="weight of the new prompts in every round's draw, as of a source")
    temperature: Annotated[PositiveFloat, Field(le=10.0)] = Field(1.0, description="of prompts and solutions")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="1 is off")
    max_new_tokens: Positive = Field(512, description="most tokens of a reply, and of a solution")
    shard_asks: Positive = Field(32, description="asks, or prompts to solve, per shard, the unit of resume and of "
                                 "determinism")

    @model_validator(mode="after")
    def agree(self):
        for key in ("{examples}", "{format}") + (("{topic}",) if "topics" in self.model_fields_set else ()):
            if key not in self.template:
                raise ValueError(f"template must contain {key}")
        if self.prompts > self.asks:
            raise ValueError(f"prompts={self.prompts} is above asks={self.asks}")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        return self


class WritingWeights(Writing):
    path: FilePath | None = Field(None, json_schema_extra=UNKEYED, description="another model that writes, named as in "
                                  "model.path. Default: the round's weights")  # its content is an input of the stage


class WritePrompts(WritingWeights, InProcess):
    pass


class WritePromptsVllm(WritingWeights, Vllm):
    pass


class WritePromptsOpenAI(Writing, OpenAI):
    pass


AnyWritePrompts = Annotated[Annotated[WritePrompts, Tag("in_process")] | Annotated[WritePromptsVllm, Tag("vllm")]
                            | Annotated[WritePromptsOpenAI, Tag("openai")], Discriminator(engine_of)]


def what_is_missing(scorer: Scorer) -> str:
    """What this scorer reads of each prompt that a written one does not have, or an empty string."""
    if scorer.code is not None:
        return "tests"
    if scorer.judge is not None:
        return "a true answer" if "{answer}" in (scorer.judge.template or "") else ""
    if scorer.rule == "choice":
        return "" if "choices" in scorer.args else "options"
    return {"reasoning_gym": "its generator's entry", "instructions": "a list of instructions"}.get(scorer.rule, "")
