// The threads of a block that have a row together; others stream.

constexpr u32 CONSUMERS = 256;
constexpr u32 MOST_HELD = 8;
// Wide rows take many instructions, and those have to be fetched, too.
constexpr bool ROLLED_NORMS = WIDTH > 2048;
__device__ __forceinline__ u32 row_threads() { return CONSUMERS; }
__device__ __forceinline__ void sync_row() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

