"""The five losses as modules, with Liger's constructors and calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from . import functional

Result = tuple[Tensor, tuple[Tensor, ...]]


class _Loss(nn.Module):
    """A module over `function`: its constructor's arguments become attributes, and options of every call."""

    function: ClassVar[Callable[..., Result]]

    def _set(self, options: dict) -> None:
        super().__init__()
        self._options = tuple(name for name in options if name not in ("self", "__class__"))
        for name in self._options:
            setattr(self, name, options[name])

    def _call(self, **inputs: Tensor | None) -> Result:
        return type(self).function(**inputs, **{name: getattr(self, name) for name in self._options})


class LigerFusedLinearDPOLoss(_Loss):
    """DPO and related losses: functional.liger_fused_linear_dpo. Raises ValueError on an unknown loss_type or a
    label_smoothing outside the loss's range.
    """

    function = staticmethod(functional.liger_fused_linear_dpo)

    def __init__(
        self, ignore_index: int = -100, beta: float = 0.1, alpha: float = 1.0, compute_nll_loss: bool = False,
        compiled: bool = True, use_ref_model: bool = True, average_log_prob: bool = False, chunk_size: int = 1,
        loss_type: str = "sigmoid", label_smoothing: float = 0.0, discopop_tau: float = 0.05,
    ) -> None:  # fmt: skip
        self._set(locals())
        functional.check_dpo(loss_type, label_smoothing)

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None,
        ref_input: Tensor | None = None, ref_weight: Tensor | None = None, ref_bias: Tensor | None = None,
    ) -> Result:  # fmt: skip
        reference = {"ref_input": ref_input, "ref_weight": ref_weight, "ref_bias": ref_bias}
        return self._call(_input=_input, weight=lin_weight, target=target, bias=bias, **reference)


class LigerFusedLinearCPOLoss(_Loss):
    """CPO: functional.liger_fused_linear_cpo."""

    function = staticmethod(functional.liger_fused_linear_cpo)

    def __init__(
        self, ignore_index: int = -100, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0,
        compute_nll_loss: bool = True, compiled: bool = True, average_log_prob: bool = False, chunk_size: int = 1,
    ) -> None:  # fmt: skip
        self._set(locals())

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Result:
        return self._call(_input=_input, weight=lin_weight, target=target, bias=bias)


class LigerFusedLinearSimPOLoss(_Loss):
    """SimPO: functional.liger_fused_linear_simpo."""

    function = staticmethod(functional.liger_fused_linear_simpo)

    def __init__(
        self, ignore_index: int = -100, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0,
        compute_nll_loss: bool = True, compiled: bool = True, gamma: float = 0.5, chunk_size: int = 1,
    ) -> None:  # fmt: skip
        self._set(locals())

    forward = LigerFusedLinearCPOLoss.forward


class LigerFusedLinearORPOLoss(_Loss):
    """ORPO: functional.liger_fused_linear_orpo."""

    function = staticmethod(functional.liger_fused_linear_orpo)

    def __init__(
        self, ignore_index: int = -100, beta: float = 0.1, compute_nll_loss: bool = True, compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:  # fmt: skip
        self._set(locals())

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> Result:  # fmt: skip
        return self._call(_input=_input, weight=lin_weight, target=target, bias=bias, nll_target=nll_target)


class LigerFusedLinearKTOLoss(_Loss):
    """KTO: functional.liger_fused_linear_kto. As in Liger, the hidden states precede the weight in the call, and
    use_ref_model defaults to False.
    """

    function = staticmethod(functional.liger_fused_linear_kto)

    def __init__(
        self, ignore_index: int = -100, beta: float = 0.1, compiled: bool = True, use_ref_model: bool = False,
        average_log_prob: bool = False, chunk_size: int = 1,
    ) -> None:  # fmt: skip
        self._set(locals())

    def forward(
        self, _input: Tensor, lin_weight: Tensor, target: Tensor, bias: Tensor | None = None,
        preference_labels: Tensor | None = None, ref_input: Tensor | None = None, ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None, kl: Tensor | None = None,
    ) -> Result:  # fmt: skip
        inputs = {"preference_labels": preference_labels, "ref_input": ref_input, "ref_weight": ref_weight}
        return self._call(
            _input=_input, weight=lin_weight, target=target, bias=bias, ref_bias=ref_bias, kl=kl, **inputs
        )
