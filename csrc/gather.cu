// gather_logprob forward and backward: one block per row, one read per element, one write per gradient. row.h has each
// thread's share. Deterministic: no atomics, sums in a fixed order.
#include "gather.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "row.h"

namespace strop {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Blocks per multiprocessor: bounds the registers, so that enough loads are in flight to hide memory latency.
constexpr int kBlocks = 4;

// The warp's sum in its first lane.
__device__ __forceinline__ Running merge_warp(Running sum, int lanes) {
  for (int apart = lanes / 2; apart > 0; apart /= 2) {
    Running other;
    other.highest = __shfl_down_sync(0xffffffffu, sum.highest, apart);
    other.total = __shfl_down_sync(0xffffffffu, sum.total, apart);
    sum = merge(sum, other);
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward_kernel(const T* logits, const int64_t* targets, float* logp, float* sums, int columns,
                   int64_t row_stride) {
  const int64_t row = blockIdx.x;
  const int64_t target = targets[row];
  const int thread = threadIdx.x;
  if (target < 0) {
    if (thread == 0) logp[row] = sums[2 * row] = sums[2 * row + 1] = 0.0f;
    return;
  }
  logits += row * row_stride;
  __shared__ float highest[kWarps], total[kWarps];  // not Running: its initial values would race with the results
  Running sum = merge_warp(scan_part(logits, columns, thread, kThreads), 32);
  if (thread % 32 == 0) highest[thread / 32] = sum.highest, total[thread / 32] = sum.total;
  __syncthreads();
  if (thread >= 32) return;
  sum.highest = highest[thread % kWarps], sum.total = total[thread % kWarps];
  sum = merge_warp(sum, kWarps);
  if (thread == 0) {
    logp[row] = logp_of(logits, columns, target, sum);
    sums[2 * row] = sum.highest, sums[2 * row + 1] = sum.total;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_kernel(const float* grads, const T* logits, const int64_t* targets, const float* at_target,
                    const float* sums, T* out, int columns, int64_t row_stride, int64_t out_stride) {
  const int64_t row = blockIdx.x;
  backward_part(logits + row * row_stride, out + row * out_stride, columns, targets[row], grads[row], at_target[row],
                Running{sums[2 * row], sums[2 * row + 1]}, threadIdx.x, kThreads);
}

template <typename T>
void launch_forward(const void* logits, const int64_t* target, float* logp, float* sums, int64_t rows, int columns,
                    int64_t row_stride, cudaStream_t stream) {
  forward_kernel<T><<<rows, kThreads, 0, stream>>>(static_cast<const T*>(logits), target, logp, sums, columns,
                                                   row_stride);
}

template <typename T>
void launch_backward(const float* grad, const void* logits, const int64_t* target, const float* at_target,
                     const float* sums, void* out, int64_t rows, int columns, int64_t row_stride, int64_t out_stride,
                     cudaStream_t stream) {
  backward_kernel<T><<<rows, kThreads, 0, stream>>>(grad, static_cast<const T*>(logits), target, at_target, sums,
                                                    static_cast<T*>(out), columns, row_stride, out_stride);
}

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* gather_forward(Element element, const void* logits, const int64_t* target, float* logp, float* sums,
                           int64_t rows, int64_t columns, int64_t row_stride, void* stream) {
  const auto launch = element == Element::bf16   ? launch_forward<__nv_bfloat16>
                      : element == Element::fp16 ? launch_forward<__half>
                                                 : launch_forward<float>;
  launch(logits, target, logp, sums, rows, columns, row_stride, static_cast<cudaStream_t>(stream));
  return launch_error();
}

const char* gather_backward(Element element, const float* grad, const void* logits, const int64_t* target,
                            const float* at_target, const float* sums, void* out, int64_t rows, int64_t columns,
                            int64_t row_stride, int64_t out_stride, void* stream) {
  const auto launch = element == Element::bf16   ? launch_backward<__nv_bfloat16>
                      : element == Element::fp16 ? launch_backward<__half>
                                                 : launch_backward<float>;
  launch(grad, logits, target, at_target, sums, out, rows, columns, row_stride, out_stride,
         static_cast<cudaStream_t>(stream));
  return launch_error();
}

}  // namespace strop
