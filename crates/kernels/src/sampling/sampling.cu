// Draws a token from each of some rows of logits: a block a row. What is computed stands in `mod.rs`; sums are of integers,
// so that their order is free.
//
// A warp has a contiguous part of the ids, so that sums of parts are in the order of ids, and threads read again what they
// wrote themselves.

constexpr u32 THREADS = 1024, WARPS = THREADS / 32;
constexpr u32 NONE = 0xffffffffu;

struct Row {
    float scale;  // 1 / temperature; 0 is the most likely token
    float penalty;
    u32 top_k;  // 0 is all
    u32 window;
    u64 top_p;  // in 2^-53
    u64 min_weight;
    u32 row;        // of the logits
    u32 recent_at;  // its recent tokens, behind which those go that are drawn
    u32 recent_len;
    float lowest;  // of valid logits
};

struct Args {
    float* logits;
    float* likelihoods;
    const Row* rows;
    u32* recent;
    const u64* words;
    u32* drawn;
    u32* tokens;    // if given, gets the token of each row
    u64* keys;      // if given, says to the decoding kernel which token is next
    const u32* passes;  // if given, counts draws from 1
    u32* invalid;
    u32 pass;
    u32 vocab;
    u32 key_count;
    u32 round;
};

struct Shared {
    u32 low[THREADS];
    u32 high[THREADS];
    u64 parts[WARPS];
    u64 above;
    u64 value;
    u32 bin;
    u32 found;
};

// Where the order of likelihoods is cut: those above the key are kept, and `kept` of the `ties` at it, lower ids first.
struct Cut {
    u32 key;
    u32 kept;
    u32 ties;
};

__device__ __forceinline__ u64 weight_of(float likelihood) { return __float2ull_rn(likelihood * 1099511627776.0f); }

// floor(a b / 2^53) for b up to 2^63 and a up to 2^53.
__device__ __forceinline__ u64 fraction_of(u64 a, u64 b) { return __umul64hi(a, b) << 11 | a * b >> 53; }

// Ids of this warp.
__device__ __forceinline__ u32 ids_of_warp(u32 vocab) { return (vocab + THREADS - 1) / THREADS * 32; }

template <class F>
__device__ __forceinline__ void for_own_ids(u32 vocab, F f) {
    u32 count = ids_of_warp(vocab), begin = threadIdx.x / 32 * count, end = min(begin + count, vocab);
#pragma unroll 4
    for (u32 id = begin + threadIdx.x % 32; id < end; id += 32) f(id);
}

__device__ __forceinline__ u64 warp_sum(u64 value) {
#pragma unroll
    for (u32 width = 16; width > 0; width /= 2) value += __shfl_xor_sync(ALL_LANES, value, width);
    return value;
}

// Sum over this lane and those below it.
__device__ __forceinline__ u64 warp_scan(u64 value) {
    u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 width = 1; width < 32; width *= 2) {
        u64 below = __shfl_up_sync(ALL_LANES, value, width);
        if (lane >= width) value += below;
    }
    return value;
}

// Gives every thread of a block the sums over the warps up to the lane's. Synchronises twice.
__device__ __forceinline__ u64 scan_of_warps(u64 value_of_warp, Shared& s) {
    if (threadIdx.x % 32 == 0) s.parts[threadIdx.x / 32] = value_of_warp;
    __syncthreads();
    u64 scan = warp_scan(s.parts[threadIdx.x % 32]);
    __syncthreads();
    return scan;
}

// The first id at which the sum of values up to it exceeds a threshold, which comes from their total. There is one.
template <class Value, class Threshold>
__device__ u32 first_exceeding(u32 vocab, Value value, Threshold threshold_of, Shared& s) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 sum = 0;
    for_own_ids(vocab, [&](u32 id) { sum += value(id); });
    u64 scan = scan_of_warps(warp_sum(sum), s);
    u64 threshold = threshold_of(__shfl_sync(ALL_LANES, scan, 31));
    // The warp's part that holds it, among all warps ...
    auto enter = [&]() {
        u32 part = __ffs(__ballot_sync(ALL_LANES, scan > threshold)) - 1;
        u64 before = __shfl_sync(ALL_LANES, scan, part == 0 ? 0 : part - 1);
        if (part > 0) threshold -= before;
        return part;
    };
    u32 count = ids_of_warp(vocab), begin = enter() * count, end = min(begin + count, vocab);
    count = (count / 32 + WARPS - 1) / WARPS * 32;
    u32 own_begin = begin + warp * count, own_end = min(own_begin + count, end);
    sum = 0;
    for (u32 id = own_begin + lane; id < own_end; id += 32) sum += value(id);
    scan = scan_of_warps(warp_sum(sum), s);
    // ... and among the warps that share that part.
    if (enter() == warp) {
        u64 before = 0;
        for (u32 first = own_begin; first < own_end; first += 32) {
            u32 id = first + lane;
            scan = before + warp_scan(id < own_end ? value(id) : 0);
            u32 exceeding = __ballot_sync(ALL_LANES, scan > threshold);
            if (exceeding) {
                if (lane == 0) s.found = first + __ffs(exceeding) - 1;
                break;
            }
            before = __shfl_sync(ALL_LANES, scan, 31);
        }
    }
    __syncthreads();
    return s.found;
}

// Goes down the likelihoods that `within` keeps until the sum of their values reaches a target, which comes from the total.
// Digit by digit of their bits: a likelihood's are in the order of the likelihoods. `excess` is in the total for ties that
// `within` does not keep. Keeps everything if the total is less than the target.
template <class Value, class Target>
__device__ Cut cut_at(const float* likelihoods, u32 vocab, Cut within, u64 excess, Value value_of, Target target_of, Shared& s) {
    // Below it weights are 0. From here to 1 there are 42 * 16 first digits.
    constexpr u32 BASE = (127 - 42) << 23;
    u32 prefix = 0;
    u64 target = 0;
#pragma unroll 1
    for (u32 digit = 0; digit < 3; ++digit) {
        u32 shift = digit == 0 ? 19 : digit == 1 ? 9 : 0, upper = digit == 1 ? 19 : 9, mask = digit == 2 ? 511 : 1023;
        s.low[threadIdx.x] = 0, s.high[threadIdx.x] = 0;
        if (threadIdx.x == 0) s.bin = NONE;
        __syncthreads();
        for_own_ids(vocab, [&](u32 id) {
            float likelihood = likelihoods[id];
            u32 key = __float_as_uint(likelihood);
            if (key < BASE || key < within.key || (digit > 0 && (key - BASE) >> upper != prefix)) return;
            u64 value = value_of(likelihood);
            u32 bin = (key - BASE) >> shift & mask, low = (u32)value, old = atomicAdd(s.low + bin, low);
            u32 high = (u32)(value >> 32) + (old + low < old);
            if (high) atomicAdd(s.high + bin, high);
        });
        __syncthreads();
        u32 bin = THREADS - 1 - threadIdx.x;
        u64 value = (u64)s.high[bin] << 32 | s.low[bin], sum = warp_scan(value);
        u64 of_warps = scan_of_warps(__shfl_sync(ALL_LANES, sum, 31), s);
        u32 warp = threadIdx.x / 32;
        u64 before = __shfl_sync(ALL_LANES, of_warps, warp == 0 ? 0 : warp - 1);
        if (warp > 0) sum += before;
        if (digit == 0) target = target_of(__shfl_sync(ALL_LANES, of_warps, 31) - excess);
        if (sum >= target && sum - value < target) s.bin = bin, s.above = sum - value, s.value = value;
        __syncthreads();
        bin = s.bin, value = s.value;
        target -= s.above;
        __syncthreads();
        if (bin == NONE) return within;
        prefix = prefix << (digit == 2 ? 9 : 10) | bin;
        if (digit == 2) {
            u64 each = value_of(__uint_as_float(BASE + prefix));
            return {BASE + prefix, (u32)((target + each - 1) / each), (u32)(value / each)};
        }
    }
    return within;
}

extern "C" __global__ void __launch_bounds__(THREADS) draw_rows(const __grid_constant__ Args a) {
    let_next_begin();
    __shared__ Shared s;
    wait_for_previous();
    const Row row = a.rows[blockIdx.x];
    u32 pass = a.passes ? *a.passes - 1 : a.pass, vocab = a.vocab;
    float* logits = a.logits + (size_t)row.row * vocab;
    float* likelihoods = a.likelihoods + (size_t)blockIdx.x * vocab;
    u32* recent = a.recent + row.recent_at;
    u32 known = row.recent_len + pass;
    if (row.penalty != 1.0f) {
        // A token that comes twice is computed twice, from the same logit.
        u32 window = min(row.window, known), id = NONE;
        float logit = 0.0f;
        if (threadIdx.x < window) {
            id = recent[known - window + threadIdx.x];
            if (id < vocab) logit = logits[id];
        }
        __syncthreads();
        if (id < vocab) logits[id] = logit > 0.0f ? logit / row.penalty : logit * row.penalty;
        __syncthreads();
    }

    u64 best = 0;
    bool is_valid = true;
    for_own_ids(vocab, [&](u32 id) {
        float logit = logits[id];
        is_valid = is_valid && logit >= row.lowest && logit < __uint_as_float(0x7f800000u);
        best = max(best, logit_key(logit, id));
    });
#pragma unroll
    for (u32 width = 16; width > 0; width /= 2) best = max(best, __shfl_xor_sync(ALL_LANES, best, width));
    if (threadIdx.x % 32 == 0) s.parts[threadIdx.x / 32] = best;
    bool is_invalid = __syncthreads_or(!is_valid);
    for (u32 warp = 0; warp < WARPS; ++warp) best = max(best, s.parts[warp]);
    u32 token = ~(u32)best;
    float highest = is_invalid ? 0.0f : logits[token];
    is_invalid = is_invalid || !is_finite(highest);
    __syncthreads();

    if (is_invalid) {
        token = 0;
        if (threadIdx.x == 0) *a.invalid = 1;
    } else if (row.scale != 0.0f) {
        for_own_ids(vocab, [&](u32 id) { likelihoods[id] = exp_f32((logits[id] - highest) * row.scale); });
        Cut cut = {0, 0, 0};
        u64 excess = 0;
        if (row.top_k > 0 && row.top_k < vocab) {
            cut = cut_at(likelihoods, vocab, cut, 0, [](float) { return 1ull; }, [&](u64) { return (u64)row.top_k; }, s);
            excess = (cut.ties - cut.kept) * weight_of(__uint_as_float(cut.key));
        }
        if (row.top_p < 1ull << 53)
            cut = cut_at(likelihoods, vocab, cut, excess, [](float likelihood) { return weight_of(likelihood); },
                         [&](u64 total) {
                             u64 enough = fraction_of(row.top_p, total);
                             enough += (row.top_p * total & (1ull << 53) - 1) != 0;
                             return max(enough, 1ull);
                         }, s);
        __syncthreads();
        u32 last_tie = NONE;
        if (cut.kept < cut.ties)
            last_tie = first_exceeding(vocab, [&](u32 id) { return (u64)(__float_as_uint(likelihoods[id]) == cut.key); },
                                       [&](u64) { return (u64)cut.kept - 1; }, s);
        u64 uniform = a.words[(size_t)pass * gridDim.x + blockIdx.x] >> 11;
        token = first_exceeding(vocab, [&](u32 id) {
                                    float likelihood = likelihoods[id];
                                    u32 key = __float_as_uint(likelihood);
                                    u64 weight = weight_of(likelihood);
                                    bool is_kept = key > cut.key || (key == cut.key && id <= last_tie);
                                    return is_kept && weight >= row.min_weight ? weight : 0ull;
                                },
                                [&](u64 total) { return fraction_of(uniform, total); }, s);
    }

    if (threadIdx.x == 0) {
        a.drawn[(size_t)pass * gridDim.x + blockIdx.x] = token;
        if (a.tokens) a.tokens[blockIdx.x] = token;
        if (row.penalty != 1.0f) recent[known] = token;
    }
    // The decoding kernel takes the largest key; blocks without a part in the head have none.
    u64 key = (u64)NONE << 32 | ((~token & 0x7fffffffu) | a.round << 31);
    for (u32 k = threadIdx.x; k < a.key_count; k += THREADS)
        if (a.keys[k]) a.keys[k] = key;
}
