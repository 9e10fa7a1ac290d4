"""The section engine: what trains. A class per engine, with the keys that this engine reads."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from strop.trainer.section import Positive, Section


class Trainer(Section):
    timeout: Positive = Field(1800, le=604_800, description="seconds that a rank waits for the others inside a "
                              "training step before the run stops with an error")


class Sequenced(Trainer):
    sequence_parallel: Positive = Field(1, le=1024, description="ranks that share a microbatch, for long rows "
                                        "(DeepSpeed-Ulysses): each holds a slice of its tokens, and in attention a "
                                        "slice of the heads; must divide the ranks and the model's attention heads")


class Auto(Sequenced):
    kind: Literal["auto"] = Field("auto", description="what holds weights, gradients and optimizer: local (whole on "
                                  "every rank), fsdp (a part on every rank, PyTorch's FSDP2), auto (local where it "
                                  "fits into memory, else fsdp)")


class Local(Sequenced):
    kind: Literal["local"] = Field("local", description="whole on every rank; gradients are summed once a step")


class Fsdp(Sequenced):
    kind: Literal["fsdp"] = Field("fsdp", description="PyTorch's FSDP2: a part on every rank")
    reshard_after_forward: bool = Field(True, description="free a layer's gathered weights after its forward pass and "
                                        "gather them again for the backward pass; false is faster and keeps all of "
                                        "them, 2 bytes a parameter in bfloat16")
    sync_each_microbatch: bool = Field(True, description="reduce gradients after every microbatch; false reduces them "
                                       "once a step and keeps whole fp32 sums, 4 bytes a parameter")
    cpu_offload: bool = Field(False, description="keep master weights and optimizer in the host's memory, and update "
                              "there")


def kind_of(value: Any) -> str:
    """The tag of a section, or of the data for one, in the union of training engines."""
    if isinstance(value, Trainer):
        return value.kind
    return str(value.get("kind", "auto")) if isinstance(value, dict) else "auto"


AnyTrainer = Annotated[Annotated[Auto, Tag("auto")] | Annotated[Local, Tag("local")] | Annotated[Fsdp, Tag("fsdp")],
                       Discriminator(kind_of)]
