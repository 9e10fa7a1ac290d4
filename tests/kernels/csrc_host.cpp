// csrc/ops.cpp for CPU tensors, as operators of the namespace strop_host: its checks and its order of arguments as they
// are, and in place of each launch the functions of csrc/row.h, one thread of a row's block after the other, and the
// block's tree of merges as in csrc/gather.cu.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <vector>

struct NoGuard {
  explicit NoGuard(int) {}
};
namespace torch::stable::accelerator {
using ::NoGuard;
}

#define strop strop_host
#define CUDA CPU
#define is_cuda is_cpu
#define DeviceGuard NoGuard
#define aoti_torch_get_current_cuda_stream(device, stream) TORCH_SUCCESS
#include "../../csrc/ops.cpp"
#include "../../csrc/row.h"

namespace strop {
namespace {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;

// As merge_warp in gather.cu: the first lane's result of shuffles that all lanes do at once.
Running merge_lanes(const Running* parts, int lanes) {
  std::vector<Running> sums(parts, parts + lanes);
  for (int apart = lanes / 2; apart > 0; apart /= 2)
    for (int lane = 0; lane < apart; ++lane) sums[lane] = merge(sums[lane], sums[lane + apart]);
  return sums[0];
}

template <typename T>
void forward(const void* logits, const int64_t* target, float* logp, float* sums, int64_t rows, int columns,
             int64_t row_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    logp[i] = sums[2 * i] = sums[2 * i + 1] = 0.0f;
    if (target[i] < 0) continue;
    const T* row = static_cast<const T*>(logits) + i * row_stride;
    Running parts[kThreads], warps[kWarps];
    for (int thread = 0; thread < kThreads; ++thread) parts[thread] = scan_part(row, columns, thread, kThreads);
    for (int warp = 0; warp < kWarps; ++warp) warps[warp] = merge_lanes(parts + warp * kWarp, kWarp);
    const Running sum = merge_lanes(warps, kWarps);
    logp[i] = logp_of(row, columns, target[i], sum);
    sums[2 * i] = sum.highest, sums[2 * i + 1] = sum.total;
  }
}

template <typename T>
void backward(const float* grad, const void* logits, const int64_t* target, const float* at_target, const float* sums,
              void* out, int64_t rows, int columns, int64_t row_stride, int64_t out_stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int thread = 0; thread < kThreads; ++thread)
      backward_part(static_cast<const T*>(logits) + i * row_stride, static_cast<T*>(out) + i * out_stride, columns,
                    target[i], grad[i], at_target[i], Running{sums[2 * i], sums[2 * i + 1]}, thread, kThreads);
}

}  // namespace

const char* gather_forward(Element element, const void* logits, const int64_t* target, float* logp, float* sums,
                           int64_t rows, int64_t columns, int64_t row_stride, void*) {
  const auto launch = element == Element::bf16   ? forward<c10::BFloat16>
                      : element == Element::fp16 ? forward<c10::Half>
                                                 : forward<float>;
  launch(logits, target, logp, sums, rows, columns, row_stride);
  return nullptr;
}

const char* gather_backward(Element element, const float* grad, const void* logits, const int64_t* target,
                            const float* at_target, const float* sums, void* out, int64_t rows, int64_t columns,
                            int64_t row_stride, int64_t out_stride, void*) {
  const auto launch = element == Element::bf16   ? backward<c10::BFloat16>
                      : element == Element::fp16 ? backward<c10::Half>
                                                 : backward<float>;
  launch(grad, logits, target, at_target, sums, out, rows, columns, row_stride, out_stride);
  return nullptr;
}

}  // namespace strop
