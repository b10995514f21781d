// Draws a token from each of some rows of logits: a block a row or, where there are few rows, the blocks of a cluster. What is
// computed stands in `mod.rs`; sums are of integers, so that their order is free.
//
// A warp has a contiguous part of the ids, so that sums of parts are in the order of ids, and threads read again what they
// wrote themselves.

constexpr u32 THREADS = 1024, WARPS = THREADS / 32;
constexpr u32 MAX_BLOCKS = 8;
constexpr u32 NONE = 0xffffffffu;
constexpr u64 INVALID = ~0ull;

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
    u32* drawn;  // NONE if a row has no valid distribution
    u32* tokens;    // if given, gets the token of each row
    u64* keys;      // if given, says to the decoding kernel which token is next
    const u32* passes;  // if given, counts draws from 1
    u32 pass;
    u32 vocab;
    u32 key_count;
    u32 round;
};

// Where the order of likelihoods is cut: those above the key are kept, and `kept` of the `ties` at it, lower ids first.
struct Cut {
    u32 key;
    u32 kept;
    u32 ties;
};

// A digit's value at the cut, and the sums of values above it and at it.
struct Digit {
    u64 bin;
    u64 above;
    u64 value;
};

struct Shared {
    uint2 bins[THREADS];  // low and high words of sums
    u64 parts[WARPS];
    u64 shares[2][MAX_BLOCKS];
    Digit digit;
    u64 found;
};

// ---- The blocks of a row ----

// A value to the same place in another block of the cluster, and from there.
__device__ __forceinline__ void store_in(u64* place, u32 block, u64 value) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.u64 [there], %2; }" ::"r"(
                     shared_address(place)),
                 "r"(block), "l"(value)
                 : "memory");
#else
    *place = value;
#endif
}

__device__ __forceinline__ u64 load_from(const void* place, u32 block) {
#if __CUDA_ARCH__ >= 900
    u64 value;
    asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %1, %2; ld.shared::cluster.u64 %0, [there]; }"
                 : "=l"(value)
                 : "r"(shared_address(place)), "r"(block)
                 : "memory");
    return value;
#else
    return *(const u64*)place;
#endif
}

// What a thread knows of the blocks of its row.
struct Team {
    Shared& s;
    u32 vocab, blocks, block;
    u32 ids;  // of a warp
    u32 turn;

    __device__ __forceinline__ Team(Shared& s, u32 vocab) : s(s), vocab(vocab), blocks(1), block(0), turn(0) {
#if __CUDA_ARCH__ >= 900
        asm("mov.u32 %0, %cluster_nctarank;" : "=r"(blocks));
        asm("mov.u32 %0, %cluster_ctarank;" : "=r"(block));
#endif
        ids = (vocab + blocks * THREADS - 1) / (blocks * THREADS) * 32;
    }

    // A barrier of all blocks, in two halves.
    __device__ __forceinline__ void arrive() const {
#if __CUDA_ARCH__ >= 900
        if (blocks > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
    }
    __device__ __forceinline__ void wait() const {
#if __CUDA_ARCH__ >= 900
        if (blocks > 1) {
            asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
            return;
        }
#endif
        __syncthreads();
    }
    __device__ __forceinline__ void sync() const {
        arrive();
        wait();
    }

    // First id of this warp, and the one behind its last.
    __device__ __forceinline__ u32 begin() const { return min((block * WARPS + threadIdx.x / 32) * ids, vocab); }
    __device__ __forceinline__ u32 end() const { return min(begin() + ids, vocab); }

    template <class F>
    __device__ __forceinline__ void for_own_ids(F f) const {
        u32 last = end();
#pragma unroll 4
        for (u32 id = begin() + threadIdx.x % 32; id < last; id += 32) f(id);
    }

    // Gives lane k what block k's first warp shares, lanes without a block 0. Synchronises.
    __device__ __forceinline__ u64 share(u64 value) {
        turn ^= 1;
        if (threadIdx.x < blocks) store_in(&s.shares[turn][block], threadIdx.x, value);
        sync();
        u32 lane = threadIdx.x % 32;
        return lane < blocks ? s.shares[turn][lane] : 0;
    }
};

__device__ __forceinline__ u64 warp_sum(u64 value) {
#pragma unroll
    for (u32 width = 16; width > 0; width /= 2) value += __shfl_xor_sync(ALL_LANES, value, width);
    return value;
}

__device__ __forceinline__ u64 warp_max(u64 value) {
#pragma unroll
    for (u32 width = 16; width > 0; width /= 2) value = max(value, __shfl_xor_sync(ALL_LANES, value, width));
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

// Of sums in order.
struct Place {
    u64 before;
    u64 total;
};

__device__ __forceinline__ Place place_in(u64 scan, u32 which) {
    u64 before = __shfl_sync(ALL_LANES, scan, which == 0 ? 0 : which - 1);
    return {which == 0 ? 0 : before, __shfl_sync(ALL_LANES, scan, 31)};
}

// Among the warps of this block. Synchronises before it is read.
__device__ __forceinline__ Place place_in_block(u64 value_of_warp, Shared& s) {
    if (threadIdx.x % 32 == 0) s.parts[threadIdx.x / 32] = value_of_warp;
    __syncthreads();
    return place_in(warp_scan(s.parts[threadIdx.x % 32]), threadIdx.x / 32);
}

// Among the warps of all blocks.
__device__ __forceinline__ Place place_in_team(u64 value_of_warp, Team& team) {
    Place in_block = place_in_block(value_of_warp, team.s);
    Place of_block = place_in(warp_scan(team.share(in_block.total)), team.block);
    return {of_block.before + in_block.before, of_block.total};
}

// ---- Drawing ----

__device__ __forceinline__ u64 weight_of(float likelihood) { return __float2ull_rn(likelihood * 1099511627776.0f); }

// floor(a b / 2^53) for b up to 2^63 and a up to 2^53.
__device__ __forceinline__ u64 fraction_of(u64 a, u64 b) { return __umul64hi(a, b) << 11 | a * b >> 53; }

// The first id at which the sum of values up to it exceeds a threshold, which comes from their total. There is one.
template <class Value, class Threshold>
__device__ u32 first_exceeding(Team& team, Value value, Threshold threshold_of) {
    Shared& s = team.s;
    u32 lane = threadIdx.x % 32;
    u64 sum = 0;
    team.for_own_ids([&](u32 id) { sum += value(id); });
    sum = warp_sum(sum);
    Place place = place_in_team(sum, team);
    u64 threshold = threshold_of(place.total);
    if (place.before <= threshold && threshold < place.before + sum) {
        // A lane has neighbours of the warp's ids ...
        u32 own = team.ids / 32, first = team.begin() + lane * own;
        u64 of_lane = 0;
        for (u32 id = first; id < min(first + own, team.end()); ++id) of_lane += value(id);
        u64 scan = place.before + warp_scan(of_lane);
        u32 which = __ffs(__ballot_sync(ALL_LANES, scan > threshold)) - 1;
        u64 before = __shfl_sync(ALL_LANES, scan - of_lane, which);
        first = __shfl_sync(ALL_LANES, first, which);
        // ... and those of one lane are among all.
        for (u32 end = min(first + own, team.end());; first += 32) {
            scan = before + warp_scan(first + lane < end ? value(first + lane) : 0);
            u32 exceeding = __ballot_sync(ALL_LANES, scan > threshold);
            if (exceeding) {
                if (lane < team.blocks) store_in(&s.found, lane, first + __ffs(exceeding) - 1);
                break;
            }
            before = __shfl_sync(ALL_LANES, scan, 31);
        }
    }
    team.sync();
    return (u32)s.found;
}

// Goes down the likelihoods that `within` keeps until the sum of their values reaches a target, which comes from the total.
// Digit by digit of their bits: a likelihood's are in the order of the likelihoods. `excess` is in the total for ties that
// `within` does not keep. Keeps everything if the total is less than the target.
template <class Value, class Target>
__device__ Cut cut_at(Team& team, const float* likelihoods, Cut within, u64 excess, Value value_of, Target target_of) {
    // Below it weights are 0. From here to 1 there are 42 * 16 first digits.
    constexpr u32 BASE = (127 - 42) << 23;
    Shared& s = team.s;
    u32 prefix = 0, bins = THREADS / team.blocks;
    u64 target = 0;
#pragma unroll 1
    for (u32 digit = 0; digit < 3; ++digit) {
        u32 shift = digit == 0 ? 19 : digit == 1 ? 9 : 0, upper = digit == 1 ? 19 : 9, mask = digit == 2 ? 511 : 1023;
        s.bins[threadIdx.x] = make_uint2(0, 0);
        if (threadIdx.x == 0) s.digit.bin = NONE;
        __syncthreads();
        team.for_own_ids([&](u32 id) {
            float likelihood = likelihoods[id];
            u32 key = __float_as_uint(likelihood);
            if (key < BASE || key < within.key || (digit > 0 && (key - BASE) >> upper != prefix)) return;
            u64 value = value_of(likelihood);
            uint2* sum = s.bins + ((key - BASE) >> shift & mask);
            u32 low = (u32)value, old = atomicAdd(&sum->x, low), high = (u32)(value >> 32) + (old + low < old);
            if (high) atomicAdd(&sum->y, high);
        });
        team.sync();
        // Each block has a part of the bins, from the highest one down.
        u32 bin = THREADS - 1 - (team.block * bins + threadIdx.x);
        u64 value = 0;
        if (threadIdx.x < bins)
            for (u32 block = 0; block < team.blocks; ++block) value += load_from(s.bins + bin, block);
        u64 sum = warp_scan(value);
        Place place = place_in_team(__shfl_sync(ALL_LANES, sum, 31), team);
        sum += place.before;
        if (digit == 0) target = target_of(place.total - excess);
        if (sum >= target && sum - value < target)
            for (u32 block = 0; block < team.blocks; ++block) {
                store_in(&s.digit.bin, block, bin);
                store_in(&s.digit.above, block, sum - value);
                store_in(&s.digit.value, block, value);
            }
        team.sync();
        Digit found = s.digit;
        target -= found.above;
        __syncthreads();
        if (found.bin == NONE) return within;
        prefix = prefix << (digit == 2 ? 9 : 10) | (u32)found.bin;
        if (digit == 2) {
            u64 each = value_of(__uint_as_float(BASE + prefix));
            return {BASE + prefix, (u32)((target + each - 1) / each), (u32)(found.value / each)};
        }
    }
    return within;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) draw_rows(const __grid_constant__ Args a) {
    let_next_begin();
    __shared__ Shared s;
    Team team(s, a.vocab);
    // A block may write to others when all have begun.
    team.arrive();
    wait_for_previous();
    u32 number = blockIdx.x / team.blocks, count = gridDim.x / team.blocks, vocab = a.vocab;
    const Row row = a.rows[number];
    u32 pass = a.passes ? *a.passes - 1 : a.pass;
    u64 uniform = a.words[(size_t)pass * count + number] >> 11;
    float* logits = a.logits + (size_t)row.row * vocab;
    float* likelihoods = a.likelihoods + (size_t)number * vocab;
    u32* recent = a.recent + row.recent_at;
    u32 known = row.recent_len + pass;
    if (row.penalty != 1.0f) {
        // A token that comes twice is computed twice, from the same logit.
        u32 window = min(row.window, known), id = NONE;
        float logit = 0.0f;
        if (threadIdx.x < window) id = recent[known - window + threadIdx.x];
        // Of this block.
        bool has = id < vocab && id / (WARPS * team.ids) == team.block;
        if (has) logit = logits[id];
        __syncthreads();
        if (has) logits[id] = logit > 0.0f ? logit / row.penalty : logit * row.penalty;
        __syncthreads();
    }

    u64 best = 0;
    team.for_own_ids([&](u32 id) {
        float logit = logits[id];
        bool is_in_range = logit >= row.lowest && logit < __uint_as_float(0x7f800000u);
        best = max(best, is_in_range ? logit_key(logit, id) : INVALID);
    });
    best = warp_max(best);
    if (threadIdx.x % 32 == 0) s.parts[threadIdx.x / 32] = best;
    __syncthreads();
    best = warp_max(s.parts[threadIdx.x % 32]);
    team.wait();
    best = warp_max(team.share(best));
    u32 token = ~(u32)best, bits = (u32)(best >> 32);
    float highest = __uint_as_float(bits ^ (bits >> 31 ? 0x80000000u : NONE));

    bool is_valid = best != INVALID && is_finite(highest);
    if (is_valid && row.scale != 0.0f) {
        team.for_own_ids([&](u32 id) { likelihoods[id] = exp_f32((logits[id] - highest) * row.scale); });
        Cut cut = {0, 0, 0};
        u64 excess = 0;
        if (row.top_k > 0 && row.top_k < vocab) {
            cut = cut_at(team, likelihoods, cut, 0, [](float) { return 1ull; }, [&](u64) { return (u64)row.top_k; });
            excess = (cut.ties - cut.kept) * weight_of(__uint_as_float(cut.key));
        }
        if (row.top_p < 1ull << 53)
            cut = cut_at(team, likelihoods, cut, excess, [](float likelihood) { return weight_of(likelihood); },
                         [&](u64 total) {
                             u64 enough = fraction_of(row.top_p, total);
                             enough += (row.top_p * total & (1ull << 53) - 1) != 0;
                             return max(enough, 1ull);
                         });
        u32 last_tie = NONE;
        if (cut.kept < cut.ties)
            last_tie = first_exceeding(team, [&](u32 id) { return (u64)(__float_as_uint(likelihoods[id]) == cut.key); },
                                       [&](u64) { return (u64)cut.kept - 1; });
        token = first_exceeding(team, [&](u32 id) {
                                    float likelihood = likelihoods[id];
                                    u32 key = __float_as_uint(likelihood);
                                    u64 weight = weight_of(likelihood);
                                    bool is_kept = key > cut.key || (key == cut.key && id <= last_tie);
                                    return is_kept && weight >= row.min_weight ? weight : 0ull;
                                },
                                [&](u64 total) { return fraction_of(uniform, total); });
    }

    if (team.block > 0) return;
    // What comes next needs a token in any case.
    if (!is_valid) token = 0;
    if (threadIdx.x == 0) {
        a.drawn[(size_t)pass * count + number] = is_valid ? token : NONE;
        if (a.tokens) a.tokens[number] = token;
        if (row.penalty != 1.0f) recent[known] = token;
    }
    // The decoding kernel takes the largest key; blocks without a part in the head have none.
    u64 key = (u64)NONE << 32 | ((~token & 0x7fffffffu) | a.round << 31);
    for (u32 k = threadIdx.x; k < a.key_count; k += THREADS)
        if (a.keys[k]) a.keys[k] = key;
}
