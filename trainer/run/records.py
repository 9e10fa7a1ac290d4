"""The JSON files of a run directory: their formats, and reading them. pydantic checks types; unknown keys are kept."""

from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, FiniteFloat, NonNegativeInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from strop.trainer.config import Share
from strop.trainer.errors import UserError
from strop.trainer.run.files import read_json


class Record(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")


class File(Record):
    hash: str
    bytes: NonNegativeInt


class Manifest(Record):
    """manifest.json of an artifact. inputs: {name: content hash or plain value}; files: {relative path: File}."""

    stage: str
    key: str
    kind: NotRequired[str]
    config: dict[str, Any]
    inputs: dict[str, Any]
    files: dict[str, File]
    counts: dict[str, int | float]
    seconds: FiniteFloat
    ranks: NotRequired[int]
    versions: dict[str, str]
    created: str


class Base(Record):
    """The start weights in plan.json."""

    revision: NotRequired[str | None]
    revisions: NotRequired[dict[str, str | None]]


class Planned(Record):
    """A stage in plan.json, see Store."""

    stage: str
    kind: str
    title: str
    round: int | None
    inputs: dict[str, str]
    state: str


class Plan(Record):
    """plan.json"""

    stages: list[Planned]
    base: NotRequired[Base]


class Promotion(Record):
    """An entry of promotions.json. candidates: {name: [evaluation stage, candidate in it]}."""

    round: int | None
    promoted: str
    weights: str | None
    candidates: dict[str, tuple[str, str]]
    refused: NotRequired[dict[str, str]]  # candidate -> why it could not be promoted


class Rate(Record):
    """Of n prompts."""

    pass_rate: Share
    n: Annotated[int, Field(gt=0)]


class Result(Rate):
    """A candidate's results on a split. mean_length: tokens; cut_share: completions that did not stop."""

    by_source: dict[str, Rate]
    mean_length: FiniteFloat
    cut_share: Share


class Summary(Record):
    """A candidate in summary.json"""

    validation: Result
    test: Result


class Kl(Record):
    """A candidate in kl.json: nats per token, over `prompts` completions."""

    kl: FiniteFloat | None
    stderr: FiniteFloat | None
    prompts: int
    tokens: int


SUMMARY, KL = TypeAdapter(dict[str, Summary]), TypeAdapter(dict[str, Kl])
MANIFEST, PLAN_RECORD, PROMOTIONS = TypeAdapter(Manifest), TypeAdapter(Plan), TypeAdapter(list[Promotion])


def read_record(path: Path, record: TypeAdapter) -> Any:
    """The content of a JSON file. Raises UserError, naming the first wrong key, if it is missing or not a `record`."""
    try:
        return record.validate_python(read_json(path))
    except ValidationError as e:
        wrong = e.errors()[0]
        key = ".".join(map(str, wrong["loc"])) or "the whole"
        raise UserError(f"{path}: damaged, {key}: {wrong['msg'].lower()}; delete its folder to re-run the stage") from e
