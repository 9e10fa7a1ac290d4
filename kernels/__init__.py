"""Stateless fused ops for post-training language models: import this package as `strop.kernels`."""

if __name__ == "kernels":
    # Python run from the repository root finds this folder when something imports Hugging Face's package `kernels`.
    import sys as _sys
    from importlib.machinery import PathFinder as _PathFinder
    from importlib.util import module_from_spec as _module_from_spec
    from pathlib import Path as _Path

    _root = _Path(__file__).resolve().parent.parent
    _spec = _PathFinder.find_spec("kernels", [p for p in _sys.path if _Path(p or ".").resolve() != _root])
    if _spec is not None and _spec.loader is not None and _spec.origin is not None:
        _sys.modules["kernels"] = _module_from_spec(_spec)
        _spec.loader.exec_module(_sys.modules["kernels"])
    else:
        # Raising would break `import transformers`, which does not catch it. It treats a module without __file__ and
        # __version__ as not installed.
        del __file__
else:
    from .attention import prefix_attention
    from .head import gather_logprob, linear_logprob
    from .layout import Group, PackedGroups
    from .preference import LOSS_TYPES, PREFERENCE_METRICS, linear_preference_loss, preference_loss, preference_means
    from .sampling import draw_key, sample_tokens

    __all__ = [
        "LOSS_TYPES", "PREFERENCE_METRICS", "Group", "PackedGroups", "draw_key", "gather_logprob", "linear_logprob",
        "linear_preference_loss", "preference_loss", "preference_means", "prefix_attention", "sample_tokens",
    ]
