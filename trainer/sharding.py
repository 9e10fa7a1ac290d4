"""The section engine: what trains. A class per engine, with the keys that this engine reads."""

import importlib.metadata
import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from strop.trainer.section import Positive, Section

OLDEST = (0, 19, 8)  # version of DeepSpeed; older ones ignore settings that we rely on


class Trainer(Section):
    timeout: Positive = Field(1800, le=604_800, description="seconds that a rank waits for the others inside a "
                              "training step before the run stops with an error")


class Sequenced(Trainer):
    sequence_parallel: Positive = Field(1, le=1024, description="ranks that share a microbatch, for long rows "
                                        "(DeepSpeed-Ulysses): each holds a slice of its tokens, and in attention a "
                                        "slice of the heads; must divide the ranks and the model's attention heads")


class Auto(Sequenced):
    kind: Literal["auto"] = Field("auto", description="what holds weights, gradients and optimizer: local (whole on "
                                  "every rank), fsdp (a part on every rank, PyTorch's FSDP2), deepspeed (ZeRO), "
                                  "auto (the first that fits by the memory plan: local, fsdp, with state on the host)")


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


class DeepSpeed(Trainer):
    kind: Literal["deepspeed"] = Field("deepspeed", description="ZeRO of DeepSpeed (the extra strop[deepspeed])")
    zero_stage: Literal[1, 2, 3] = Field(2, description="what each rank keeps a part of: 1 the optimizer, 2 also the "
                                         "gradients, 3 also the weights")
    offload_optimizer: Literal["none", "cpu"] = Field("none", description="cpu: the optimizer and the fp32 weights are "
                                                      "in the host's memory, and are updated there")
    offload_param: Literal["none", "cpu"] = Field("none", description="cpu: weights that are not in use are in the "
                                                  "host's memory; needs zero_stage=3")

    @model_validator(mode="after")
    def agree(self):
        if self.zero_stage < 3 and self.offload_param != "none":
            raise ValueError(f"offload_param={self.offload_param} needs zero_stage=3, and zero_stage={self.zero_stage}")
        return self


def deepspeed_fault() -> str | None:
    """Why DeepSpeed cannot be used here; None if it can."""
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return "DeepSpeed is not installed"
    old = tuple(int(part) for part in re.findall(r"\d+", found)[:3]) < OLDEST
    return f"DeepSpeed {found} is too old" if old else None


def kind_of(value: Any) -> str:
    """The tag of a section, or of the data for one, in the union of training engines."""
    if isinstance(value, Trainer):
        return value.kind
    return str(value.get("kind", "auto")) if isinstance(value, dict) else "auto"


AnyTrainer = Annotated[Annotated[Auto, Tag("auto")] | Annotated[Local, Tag("local")] | Annotated[Fsdp, Tag("fsdp")]
                       | Annotated[DeepSpeed, Tag("deepspeed")], Discriminator(kind_of)]
