"""Drop-in for `liger_kernel.chunked_loss`: `import strop.kernels.integrations.liger as chunked_loss`.

DPO, CPO, SimPO, ORPO and KTO are implemented here and do not need Liger; every other public name is imported from Liger
on first use. docs/drop-ins.md lists the differences from Liger's results.
"""

from __future__ import annotations

from importlib import import_module

from . import functional, modules

# Liger's module of every name that is imported from Liger.
_OF_LIGER = {
    name: module
    for module, names in {
        "cosine_similarity_loss": "LigerFusedLinearCosineSimilarityFunction LigerFusedLinearCosineSimilarityLoss",
        "functional": "liger_fused_linear_cosine liger_fused_linear_grpo liger_fused_linear_jsd",
        "fused_linear_distillation": "LigerFusedLinearDistillationBase",
        "fused_linear_ppo": "LigerFusedLinearPPOBase",
        "fused_linear_preference": "LigerFusedLinearPreferenceBase",
        "fused_linear_unpaired_preference": "LigerFusedLinearUnpairedPreferenceBase",
        "grpo_loss": "LigerFusedLinearGRPOFunction LigerFusedLinearGRPOLoss clip_coef_fn get_gamma_weights k3_loss_fn "
        "sapo_loss_fn",
        "jsd_loss": "LigerFusedLinearJSDFunction LigerFusedLinearJSDLoss",
    }.items()
    for name in names.split()
}
_OURS = {name: value for home in (functional, modules) for name, value in vars(home).items()
         if name.startswith(("liger_fused_linear_", "LigerFusedLinear"))}  # fmt: skip
globals().update(_OURS)
__all__ = sorted([*_OURS, *_OF_LIGER])


def __getattr__(name: str):
    if name not in _OF_LIGER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"liger_kernel.chunked_loss.{_OF_LIGER[name]}")
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] != "liger_kernel":
            raise
        raise ImportError(f"{name} is part of Liger, which is not installed: pip install liger-kernel") from e
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
