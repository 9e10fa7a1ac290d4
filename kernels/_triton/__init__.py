"""Triton kernels, one family a file, imported only where a GPU (or Triton's interpreter) runs them."""
