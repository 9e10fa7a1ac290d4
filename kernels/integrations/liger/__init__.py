"""Drop-in for `liger_kernel.chunked_loss`: `import strop.kernels.integrations.liger as chunked_loss`.

DPO, CPO, SimPO, ORPO and KTO are implemented here and do not need Liger; every other public name is imported from Liger
on first use. docs/drop-ins.md lists the differences from Liger's results.
"""

from __future__ import annotations

from importlib import import_module

from .functional import (
    LigerFusedLinearCPOFunction,
    LigerFusedLinearDPOFunction,
    LigerFusedLinearKTOFunction,
    LigerFusedLinearORPOFunction,
    LigerFusedLinearSimPOFunction,
    liger_fused_linear_cpo,
    liger_fused_linear_dpo,
    liger_fused_linear_kto,
    liger_fused_linear_orpo,
    liger_fused_linear_simpo,
)
from .modules import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)

__all__ = [
    "LigerFusedLinearCPOFunction",
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCosineSimilarityFunction",
    "LigerFusedLinearCosineSimilarityLoss",
    "LigerFusedLinearDPOFunction",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearDistillationBase",
    "LigerFusedLinearGRPOFunction",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSDFunction",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKTOFunction",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOFunction",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearPPOBase",
    "LigerFusedLinearPreferenceBase",
    "LigerFusedLinearSimPOFunction",
    "LigerFusedLinearSimPOLoss",
    "LigerFusedLinearUnpairedPreferenceBase",
    "clip_coef_fn",
    "get_gamma_weights",
    "k3_loss_fn",
    "liger_fused_linear_cosine",
    "liger_fused_linear_cpo",
    "liger_fused_linear_dpo",
    "liger_fused_linear_grpo",
    "liger_fused_linear_jsd",
    "liger_fused_linear_kto",
    "liger_fused_linear_orpo",
    "liger_fused_linear_simpo",
    "sapo_loss_fn",
]

# The Liger module of each name that is imported from Liger.
_OF_LIGER = {
    "LigerFusedLinearCosineSimilarityFunction": "cosine_similarity_loss",
    "LigerFusedLinearCosineSimilarityLoss": "cosine_similarity_loss",
    "LigerFusedLinearDistillationBase": "fused_linear_distillation",
    "LigerFusedLinearGRPOFunction": "grpo_loss",
    "LigerFusedLinearGRPOLoss": "grpo_loss",
    "LigerFusedLinearJSDFunction": "jsd_loss",
    "LigerFusedLinearJSDLoss": "jsd_loss",
    "LigerFusedLinearPPOBase": "fused_linear_ppo",
    "LigerFusedLinearPreferenceBase": "fused_linear_preference",
    "LigerFusedLinearUnpairedPreferenceBase": "fused_linear_unpaired_preference",
    "clip_coef_fn": "grpo_loss",
    "get_gamma_weights": "grpo_loss",
    "k3_loss_fn": "grpo_loss",
    "liger_fused_linear_cosine": "functional",
    "liger_fused_linear_grpo": "functional",
    "liger_fused_linear_jsd": "functional",
    "sapo_loss_fn": "grpo_loss",
}


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
