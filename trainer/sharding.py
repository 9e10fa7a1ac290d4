"""The section engine: what trains. A class per engine, with the keys that this engine reads."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from strop.trainer.section import FilePath, NotNegative, Positive, Section


class Trainer(Section):
    timeout: Positive = Field(1800, le=604_800, description="seconds that a rank waits for the others inside a "
                              "training step before the run stops with an error")


class Auto(Trainer):
    kind: Literal["auto"] = Field("auto", description="what holds weights, gradients and optimizer: local (whole on "
                                  "every rank), fsdp (a part on every rank, PyTorch's FSDP2), deepspeed (ZeRO), "
                                  "auto (local where it fits into memory, else fsdp)")


class Local(Trainer):
    kind: Literal["local"] = Field("local", description="whole on every rank; gradients are summed once a step")


class Fsdp(Trainer):
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
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field("none", description="where the optimizer and the fp32 "
                                                              "weights are; nvme needs zero_stage=3")
    offload_param: Literal["none", "cpu", "nvme"] = Field("none", description="where the weights are while they are "
                                                          "not used; needs zero_stage=3")
    nvme_path: FilePath | None = Field(None, description="folder on a local NVMe disk of each machine, for nvme")
    persistence_threshold: NotNegative = Field(100_000, description="with zero_stage=3 weights of fewer elements stay "
                                               "whole on every rank")

    @model_validator(mode="after")
    def agree(self):
        nvme = [key for key in ("offload_optimizer", "offload_param") if getattr(self, key) == "nvme"]
        if nvme and self.nvme_path is None:
            raise ValueError(f"{nvme[0]}=nvme needs nvme_path, a folder on a local disk")
        if self.nvme_path is not None and not nvme:
            raise ValueError("nvme_path is read with offload_optimizer=nvme or offload_param=nvme only; leave it out")
        if self.zero_stage < 3:
            if self.offload_param != "none" or nvme:
                key = "offload_param" if self.offload_param != "none" else nvme[0]
                raise ValueError(f"{key}={getattr(self, key)} needs zero_stage=3, and zero_stage={self.zero_stage}")
            if self.persistence_threshold != type(self).model_fields["persistence_threshold"].default:
                raise ValueError("persistence_threshold is read with zero_stage=3 only; leave it out")
        return self


def kind_of(value: Any) -> str:
    """The tag of a section, or of the data for one, in the union of training engines."""
    if isinstance(value, Trainer):
        return value.kind
    return str(value.get("kind", "auto")) if isinstance(value, dict) else "auto"


AnyTrainer = Annotated[Annotated[Auto, Tag("auto")] | Annotated[Local, Tag("local")] | Annotated[Fsdp, Tag("fsdp")]
                       | Annotated[DeepSpeed, Tag("deepspeed")], Discriminator(kind_of)]
