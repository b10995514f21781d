// A block of threads has one row.

constexpr u32 MOST_HELD = 4;
constexpr bool ROLLED_NORMS = false;
__device__ __forceinline__ u32 row_threads() { return blockDim.x; }
__device__ __forceinline__ void sync_row() { __syncthreads(); }

