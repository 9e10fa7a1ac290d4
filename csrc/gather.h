// gather_logprob's launches without PyTorch types, so that the kernels compile without PyTorch's headers.
#pragma once

#include <cstdint>

namespace strop {

enum class Element { bf16, fp16, fp32 };

// logits [rows, columns] with contiguous columns and row_stride elements between rows; target [rows],
// negative where ignored; logp [rows]; sums [rows, 2]: the highest logit and the sum of exp(logits - highest), whose
// rounded log-sum-exp would be a relative error of all gradients. Returns nullptr or an error message.
const char* gather_forward(Element element, const void* logits, const int64_t* target, float* logp, float* sums,
                           int64_t rows, int64_t columns, int64_t row_stride, void* stream);

// out [rows, columns], which may be logits, = -grad * (softmax(logits), at_target in the target's column); zeros
// where the target is negative or grad is 0.
const char* gather_backward(Element element, const float* grad, const void* logits, const int64_t* target,
                            const float* at_target, const float* sums, void* out, int64_t rows, int64_t columns,
                            int64_t row_stride, int64_t out_stride, void* stream);

}  // namespace strop
