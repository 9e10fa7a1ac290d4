"""Device code: Triton kernels and their launches."""

from importlib.util import find_spec

import torch
from torch import Tensor

# Looked up once at import: torch.compile must not trace into importlib.
HAS_TRITON = find_spec("triton") is not None
MOST = 4096  # launches that are remembered
# (kernel, device, what Triton compiles for) -> (the compiled kernel, its constants in the order of its parameters)
_compiled: dict[tuple, tuple] = {}


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """kernel[grid](*arguments, **options) on the GPU of the first argument, a tensor; nothing for an empty grid.

    Triton launches on PyTorch's current device, whatever device the tensors are on.
    """
    if 0 in grid:
        return
    x = arguments[0]
    if not x.is_cuda:  # under the interpreter there is no GPU
        kernel[grid](*arguments, **options)
    elif x.device.index == torch.cuda.current_device():
        launch_again(kernel, grid, arguments, options)
    else:
        with torch.cuda.device(x.device):
            launch_again(kernel, grid, arguments, options)


def launch_again(kernel, grid: tuple[int, ...], arguments: tuple, options: dict) -> None:
    """A launch like one before goes past the look-up of its compiled kernel, which is half of the host's time.

    Triton compiles for the types of numbers, for integers that are 1 or a multiple of 16, and for the types and
    alignment of tensors. The key has all that and more: of an integer its value. Tensor descriptors have no hash.
    """
    if any(type(x).__hash__ is None for x in options.values()):
        kernel[grid](*arguments, **options)
        return
    key = [kernel, arguments[0].device, *options, *options.values()]
    for x in arguments:
        kind = type(x)
        if kind is float:
            key.append(kind)
        elif kind is int:
            key.append(x)
        elif isinstance(x, Tensor):
            key += x.dtype, x.data_ptr() & 255
        else:
            key += kind, x
    found = _compiled.get(key := tuple(key))
    if found is not None:
        compiled, constants = found
        compiled[(*grid, 1, 1)](*arguments, *constants)
        return
    compiled, names = kernel[grid](*arguments, **options), getattr(kernel, "arg_names", ())
    # AMD's kernels are also compiled for the size of a tensor's memory
    if torch.version.hip is None and compiled is not None and set(names[len(arguments):]) <= options.keys():
        if len(_compiled) >= MOST:
            _compiled.clear()
        _compiled[key] = compiled, tuple(options[name] for name in names[len(arguments):])
