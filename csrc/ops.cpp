// gather_logprob's kernels as PyTorch operators on the stable ABI: one build works with every PyTorch from 2.11 on.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "gather.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

strop::Element element_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half || type == ScalarType::Float,
                  "logits must be bf16, fp16 or fp32");
  return type == ScalarType::BFloat16 ? strop::Element::bf16
         : type == ScalarType::Half   ? strop::Element::fp16
                                      : strop::Element::fp32;
}

// Logits or their gradient: a matrix with contiguous columns.
void check_matrix(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 2, "expected a matrix on a CUDA device");
  STD_TORCH_CHECK(x.stride(1) == 1 || x.size(1) == 1, "columns must lie side by side");
  STD_TORCH_CHECK(x.size(0) <= INT32_MAX && x.size(1) <= INT32_MAX, "more rows or columns than 2^31 - 1");
}

void check_rows(const Tensor& x, const Tensor& logits, ScalarType type, int values = 1) {
  STD_TORCH_CHECK(x.dim() == (values > 1 ? 2 : 1) && x.size(0) == logits.size(0) && x.is_contiguous() &&
                      (values == 1 || x.size(1) == values),
                  "expected one value a row, of sums two");
  STD_TORCH_CHECK(x.scalar_type() == type, "target must be int64, all else of a row fp32");
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == logits.get_device_index(), "all must be on one device");
}

void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

const float* floats(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }

void check_launch(const char* error) { STD_TORCH_CHECK(error == nullptr, "launch failed: ", error); }

void gather_forward(const Tensor& logits, const Tensor& target, const Tensor& logp, const Tensor& sums) {
  check_matrix(logits);
  check_rows(target, logits, ScalarType::Long);
  check_rows(logp, logits, ScalarType::Float);
  check_rows(sums, logits, ScalarType::Float, 2);
  const strop::Element element = element_of(logits);
  if (logits.size(0) == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check_launch(strop::gather_forward(element, logits.const_data_ptr(),
                                     static_cast<const int64_t*>(target.const_data_ptr()),
                                     static_cast<float*>(logp.mutable_data_ptr()),
                                     static_cast<float*>(sums.mutable_data_ptr()), logits.size(0), logits.size(1),
                                     logits.stride(0), current_stream(logits)));
}

void gather_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& at_target,
                     const Tensor& sums, const Tensor& out) {
  check_matrix(logits);
  check_matrix(out);
  STD_TORCH_CHECK(out.size(0) == logits.size(0) && out.size(1) == logits.size(1), "out must be as logits");
  STD_TORCH_CHECK(out.scalar_type() == logits.scalar_type(), "out must be as logits");
  STD_TORCH_CHECK(out.get_device_index() == logits.get_device_index(), "all must be on one device");
  check_rows(grad, logits, ScalarType::Float);
  check_rows(target, logits, ScalarType::Long);
  check_rows(at_target, logits, ScalarType::Float);
  check_rows(sums, logits, ScalarType::Float, 2);
  const strop::Element element = element_of(logits);
  if (logits.size(0) == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check_launch(strop::gather_backward(element, floats(grad), logits.const_data_ptr(),
                                      static_cast<const int64_t*>(target.const_data_ptr()), floats(at_target),
                                      floats(sums), out.mutable_data_ptr(), logits.size(0), logits.size(1),
                                      logits.stride(0), out.stride(0), current_stream(logits)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(strop, m) {
  m.def("cuda_gather_forward(Tensor logits, Tensor target, Tensor(a!) logp, Tensor(b!) sums) -> ()");
  m.def(
      "cuda_gather_backward(Tensor grad, Tensor logits, Tensor target, Tensor at_target, Tensor sums, Tensor(a!) out)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(strop, CUDA, m) {
  m.impl("cuda_gather_forward", TORCH_BOX(&gather_forward));
  m.impl("cuda_gather_backward", TORCH_BOX(&gather_backward));
}
