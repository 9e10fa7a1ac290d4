"""The keys of scorers: a class per kind that has keys of its own."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from strop.trainer.engines import OpenAI, Vllm, engine_of
from strop.trainer.section import UNKEYED, FilePath, Positive, PositiveFloat, Section

Rule = Literal["reasoning_gym", "number", "exact", "choice", "regex", "math", "instructions"]


class Code(Section):
    kind: Literal["asserts", "pytest", "stdio"] = Field(
        "asserts", description="the tests: asserts (a text or a list of texts), a pytest file, or a list of {input, "
        "output} for stdin and stdout")
    tests_column: str = Field("tests", description="column with the tests")
    entry_column: str | None = Field(None, description="column with the name of the function to write; a function "
                                     "check(candidate) in the tests is called with it")
    prefix_column: str | None = Field(None, description="column with code that is put before the completion's")
    module: str = Field("solution", pattern=r"^[A-Za-z_]\w*$", description="pytest: name by which the tests import the "
                        "program")
    command: list[str] = Field([], description="stdio: what runs the program, e.g. [node, program]. Default: "
                               "Python")
    file: str = Field("program", pattern=r"^[A-Za-z0-9_][\w.-]*$", description="stdio: file that the program is "
                      "written to for command")
    processes: Positive = Field(1, le=1024, description="processes of a program; 1 forbids it to start any")
    output_kb: Positive = Field(1024, le=1 << 20, description="largest output, and largest file, of a program")

    @model_validator(mode="after")
    def agree(self):
        if self.command and self.kind != "stdio":
            raise ValueError(f"command is for kind=stdio; kind={self.kind} runs Python")
        return self


class LocalJudge(Section):
    engine: Literal["in_process"] = Field("in_process", description="what the judge runs on: in_process, vllm "
                                          "(started by Strop) or openai (a server with OpenAI's protocol)")
    name: str | None = Field(None, min_length=1, max_length=100, description="name of the judge in reports. Default: "
                             "the folder's, or start")
    path: FilePath | None = Field(None, description="folder of a causal LM. Default: the run's start weights")

    @model_validator(mode="after")
    def named(self):
        if self.name is None:
            self.name = Path(self.path).name if self.path else "start"
        return self


class VllmJudge(LocalJudge, Vllm):
    engine: Literal["vllm"] = Field("vllm", description="vLLM, started for the judge's weights while it judges")
    max_tokens: Positive = Field(8192, description="most tokens of a question with its verdict, which the engine "
                                 "reserves memory for; a longer one has no verdict")


class ServedJudge(OpenAI):
    name: str | None = Field(None, min_length=1, max_length=100,
                             description="name of the judge in reports. Default: the model's")
    max_new_tokens: Positive = Field(1024, description="most tokens of a judge's answer")

    @model_validator(mode="after")
    def named(self):
        if self.name is None:
            self.name = self.model
        for key in ("budget", "prompt_price", "completion_price"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is not read by a judge; leave it out")
        return self


AnyJudge = Annotated[Annotated[LocalJudge, Tag("in_process")] | Annotated[VllmJudge, Tag("vllm")]
                     | Annotated[ServedJudge, Tag("openai")], Discriminator(engine_of)]


OF_PROMPTS = ("difficulty", "intentions", "topic")  # modes that judge the prompt, the same for all its completions


class Judge(Section):
    mode: Literal["pairwise", "rubric", "difficulty", "intentions", "topic"] = Field(
        description="pairwise: the completions of a prompt two by two, in both orders; only verdicts that agree count, "
        "and the score is the share won. rubric: a grade for each completion, scaled to 0 to 1. Of the prompt: "
        "difficulty, a grade scaled to 0 to 1; intentions, the number of things that it asks for, scaled likewise; "
        "topic, one of labels")
    models: list[AnyJudge] = Field([LocalJudge()], min_length=1, description="the judges: the majority of a pair's "
                                     "verdicts, the median of the grades")
    rubric: str = Field("It follows the request, is correct and complete, and says so clearly.",
                        description="what makes an answer good")
    template: str | None = Field(None, description="text for the judge instead of the default one; {prompt}, {verdict} "
                                 "(how to put it), {rubric} and {answer} (the true one) are replaced, and {first} and "
                                 "{second}, {completion} or {labels}")
    scale: tuple[int, int] | None = Field(None, description="lowest and highest grade. Default: 1 to 10, of difficulty "
                                          "1 to 3")
    labels: list[str] = Field([], max_length=26, description="topic: the topics, at least two")
    opponents: Positive | None = Field(None, description="pairwise: how many other completions of its prompt each one "
                                       "is compared with from its side. Default: all")

    @model_validator(mode="after")
    def agree(self):
        read = {"pairwise": {"rubric", "opponents"}, "rubric": {"rubric", "scale"}, "topic": {"labels"}}
        for key in {"rubric", "scale", "opponents", "labels"} - read.get(self.mode, {"scale"}):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is not read by a {self.mode} judge; leave it out")
        if self.scale is None and "scale" in read.get(self.mode, {"scale"}):
            self.scale = (1, 3) if self.mode == "difficulty" else (1, 10)
        low, high = self.scale or (0, 1)
        if not low < high <= low + 100:
            raise ValueError(f"scale={list(self.scale)}: the best grade must be above the worst, by at most 100")
        if self.mode == "topic" and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)
                                     or not all(label.strip() and label.isprintable() for label in self.labels)):
            raise ValueError("labels: name at least two topics, all different, in a line each")
        names = [model.name for model in self.models]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise ValueError(f"models: two are named {twice}; give each its own name")
        needed = ["prompt", "verdict", *{"pairwise": ["first", "second"], "rubric": ["completion"],
                                         "topic": ["labels"]}.get(self.mode, [])]
        missing = [name for name in needed if self.template is not None and f"{{{name}}}" not in self.template]
        if missing:
            raise ValueError(f"template must contain {{{missing[0]}}}")
        return self


class Scorer(Section):
    name: str | None = Field(None, min_length=1, max_length=100,
                             description="name of the scorer in tables and reports. Default: the rule's, the "
                             "function's or the folder's")
    rule: Rule | None = Field(None, description="a built-in rule")
    args: dict[str, Any] = Field({}, description="rule: its arguments (regex: pattern; number: tolerance; choice: "
                                 "choices; instructions: loose, all)")
    python: FilePath | None = Field(None, description="instead of rule: a function of your own, as file.py:function")
    code: Code | None = Field(None, description="instead of rule: run the completion's code against unit tests in a "
                              "sandbox; the score is the share that passes")
    reward_model: FilePath | None = Field(None, json_schema_extra=UNKEYED,
                                          description="instead of rule: the folder of a reward model, a sequence "
                                          "classifier of transformers with one output; its content counts")
    judge: Judge | None = Field(None, description="instead of rule: language models as judges")
    weight: float = Field(1.0, ge=-1e6, le=1e6, json_schema_extra=UNKEYED,
                          description="of this value in the sum that is a completion's score; 0 only records it")
    seconds: PositiveFloat = Field(10.0, le=86_400, description="python and code: time limit for a "
                                   "completion, or for a test with code.kind=stdio")
    memory_gb: PositiveFloat | None = Field(None, le=4096, description="memory limit of a process. Default: 4 for "
                                            "python, 1 for code")

    @model_validator(mode="after")
    def one_kind(self):
        kinds = [k for k in UNREAD if getattr(self, k) is not None]
        if len(kinds) != 1:
            raise ValueError(f"name exactly one of {', '.join(UNREAD)}")
        for key in UNREAD[kinds[0]]:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is not read by a {kinds[0]} scorer; leave it out")
        if self.of_prompts:
            if "weight" in self.model_fields_set and self.weight:
                raise ValueError(f"weight={self.weight:g}: a judge of prompts says the same of all completions of a "
                                 "prompt; set it to 0 or leave it out")
            self.weight = 0.0
        if self.python is not None and not re.fullmatch(r".+\.py:[A-Za-z_]\w*", self.python):
            raise ValueError(f"python={self.python} must be file.py:function")
        if self.name is None:
            self.name = (self.rule or (self.reward_model and Path(self.reward_model).name)
                         or (self.judge and f"judge_{self.judge.mode}") or (self.python or "code").rpartition(":")[2])
        return self


    @property
    def of_prompts(self) -> bool:
        """Whether the value is of the prompt, not of a completion."""
        return self.judge is not None and self.judge.mode in OF_PROMPTS


# kinds of scorers, with the keys that only other kinds have
UNREAD = {"rule": ("seconds", "memory_gb"), "python": ("args",), "code": ("args",),
          "reward_model": ("args", "seconds", "memory_gb"), "judge": ("args", "seconds", "memory_gb")}
