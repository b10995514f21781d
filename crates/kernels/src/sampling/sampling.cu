// Draws a token from each of some rows of logits: a block a row or, where there are few rows, the blocks of a cluster. What is
// computed stands in `mod.rs`; sums are of integers, so that their order is free.
//
// A warp has a contiguous part of the ids, so that sums of parts are in the order of ids, and threads read again what they
// wrote themselves.

constexpr u32 THREADS = 1024, WARPS = THREADS / 32;
constexpr u32 MAX_BLOCKS = 8;
// Rounds until a barrier and a place are used again.
constexpr u32 ROUNDS = 4;
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

// Sixteen bytes, as they are sent.
struct __align__(16) Words {
    u64 first;
    u64 second;
};

struct Shared {
    uint2 bins[THREADS];       // of this block: low and high words of sums
    Words received[THREADS / 2];  // bins that this block adds up, of each block
    Words shares[ROUNDS][MAX_BLOCKS];
    Words digit[2];  // the sums above the cut's bin and in it; the bin
    Words found;
    Words parts[ROUNDS][WARPS];
    u64 round_over[ROUNDS];
};

// What a thread knows of the blocks of its row. They work in rounds: in each a block sends others what it has to, and then
// waits for what it gets. Of two rounds that follow each other, in one at least every block waits for all others; and before
// a block sends in such a round its threads meet. So no block is so far ahead that it sends to places that are still read, or
// counts at a barrier that still waits.
struct Team {
    Shared& s;
    u32 vocab, blocks, block;
    u32 ids;  // of a warp
    u32 round;

    // Behind it `begin` is due before the first round.
    __device__ __forceinline__ Team(Shared& s, u32 vocab) : s(s), vocab(vocab), blocks(1), block(0), round(0) {
#if __CUDA_ARCH__ >= 900
        asm("mov.u32 %0, %cluster_nctarank;" : "=r"(blocks));
        asm("mov.u32 %0, %cluster_ctarank;" : "=r"(block));
        if (threadIdx.x == 0) {
            for (u32 k = 0; k < ROUNDS; ++k) make_barrier(shared_address(s.round_over + k), 1);
            fence_barriers();
        }
        __syncwarp();
        if (blocks > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
        ids = (vocab + blocks * THREADS - 1) / (blocks * THREADS) * 32;
    }

    // All blocks have begun.
    __device__ __forceinline__ void begin() const {
#if __CUDA_ARCH__ >= 900
        if (blocks > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
    }

    // To the same place in another block.
    __device__ __forceinline__ void send(Words& place, u32 to, u64 first, u64 second = 0) const {
        // Launched without a cluster, a block cannot send to itself.
        if (blocks == 1) {
            place = {first, second};
            return;
        }
#if __CUDA_ARCH__ >= 900
        asm volatile(
            "{ .reg .b32 there, over; mapa.shared::cluster.u32 there, %0, %2; mapa.shared::cluster.u32 over, %1, %2; "
            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b64 [there], {%3, %4}, [over]; }" ::"r"(
                shared_address(&place)),
            "r"(shared_address(s.round_over + round % ROUNDS)), "r"(to), "l"(first), "l"(second)
            : "memory");
#endif
    }

    // Waits for so many times sixteen bytes.
    __device__ __forceinline__ void receive(u32 count) {
        if (blocks == 1) __syncthreads();
#if __CUDA_ARCH__ >= 900
        if (blocks > 1) {
            u32 barrier = shared_address(s.round_over + round % ROUNDS);
            if (threadIdx.x == 0) expect_bytes(barrier, 16 * count);
            wait_for(barrier, round / ROUNDS % 2);
        }
#endif
        ++round;
    }

    // First id of this warp, and the one behind its last.
    __device__ __forceinline__ u32 first_id() const { return min((block * WARPS + threadIdx.x / 32) * ids, vocab); }
    __device__ __forceinline__ u32 end_id() const { return min(first_id() + ids, vocab); }

    template <class F>
    __device__ __forceinline__ void for_own_ids(F f) const {
        u32 end = end_id();
#pragma unroll 4
        for (u32 id = first_id() + threadIdx.x % 32; id < end; id += 32) f(id);
    }

    // Gives lane k what warp k of this block has, for what comes before the next round. Synchronises.
    __device__ __forceinline__ Words share_in_block(u64 first, u64 second = 0) {
        Words(&parts)[WARPS] = s.parts[round % ROUNDS];
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = {first, second};
        __syncthreads();
        return parts[threadIdx.x % 32];
    }

    // Gives lane k what block k's first warp has, lanes without a block zeros: a round.
    __device__ __forceinline__ Words share(u64 first, u64 second = 0) {
        Words(&shares)[MAX_BLOCKS] = s.shares[round % ROUNDS];
        if (threadIdx.x < blocks) send(shares[block], threadIdx.x, first, second);
        receive(blocks);
        u32 lane = threadIdx.x % 32;
        return lane < blocks ? shares[lane] : Words{0, 0};
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

// Among the warps of all blocks.
__device__ __forceinline__ Place place_of(u64 value_of_warp, Team& team) {
    Place in_block = place_in(warp_scan(team.share_in_block(value_of_warp).first), threadIdx.x / 32);
    Place of_block = place_in(warp_scan(team.share(in_block.total).first), team.block);
    return {of_block.before + in_block.before, of_block.total};
}

// ---- Drawing ----

__device__ __forceinline__ u64 weight_of(float likelihood) { return __float2ull_rn(likelihood * 1099511627776.0f); }

// Of a key.
__device__ __forceinline__ float logit_of(u64 key) {
    u32 bits = (u32)(key >> 32);
    return __uint_as_float(bits ^ (bits >> 31 ? 0x80000000u : NONE));
}

// floor(a b / 2^53) for b up to 2^63 and a up to 2^53.
__device__ __forceinline__ u64 fraction_of(u64 a, u64 b) { return __umul64hi(a, b) << 11 | a * b >> 53; }

// The first id at which the sum of values up to it exceeds a threshold, which comes from their total. There is one. The warp
// that has it gets it, others NONE.
template <class Value, class Threshold>
__device__ u32 first_exceeding(Team& team, Value value, Threshold threshold_of) {
    u32 lane = threadIdx.x % 32;
    u64 sum = 0;
    team.for_own_ids([&](u32 id) { sum += value(id); });
    sum = warp_sum(sum);
    Place place = place_of(sum, team);
    u64 threshold = threshold_of(place.total);
    if (threshold < place.before || threshold >= place.before + sum) return NONE;
    // A lane has neighbours of the warp's ids ...
    u32 own = team.ids / 32, first = team.first_id() + lane * own;
    u64 of_lane = 0;
    for (u32 id = first; id < min(first + own, team.end_id()); ++id) of_lane += value(id);
    u64 scan = place.before + warp_scan(of_lane);
    u32 which = __ffs(__ballot_sync(ALL_LANES, scan > threshold)) - 1;
    u64 before = __shfl_sync(ALL_LANES, scan - of_lane, which);
    first = __shfl_sync(ALL_LANES, first, which);
    // ... and those of one lane are among all.
    for (u32 end = min(first + own, team.end_id());; first += 32) {
        scan = before + warp_scan(first + lane < end ? value(first + lane) : 0);
        u32 exceeding = __ballot_sync(ALL_LANES, scan > threshold);
        if (exceeding) return first + __ffs(exceeding) - 1;
        before = __shfl_sync(ALL_LANES, scan, 31);
    }
}

// Goes down the likelihoods that `within` keeps until the sum of their values reaches a target, which comes from the total.
// Their bits are in their order, and so are the bits' distances from the least one that counts: it goes digit by digit, as
// many as these distances have. `excess` is in the total for ties that `within` does not keep. Keeps everything if the total
// is less than the target.
template <class Value, class Target>
__device__ Cut cut_at(Team& team, const float* likelihoods, Cut within, u64 excess, Value value_of, Target target_of) {
    constexpr u32 DIGIT = 10;
    static_assert(THREADS == 1 << DIGIT, "a bin a thread");
    Shared& s = team.s;
    u32 base = within.key, bits = 32 - __clz(__float_as_uint(1.0f) - base);
    u32 bins = THREADS / team.blocks;
    u64 target = 0;
    for (bool is_first = true;; is_first = false) {
        u32 shift = bits > DIGIT ? bits - DIGIT : 0;
        team.for_own_ids([&](u32 id) {
            float likelihood = likelihoods[id];
            u32 distance = __float_as_uint(likelihood) - base;
            if (distance >> bits) return;
            u64 value = value_of(likelihood);
            uint2* sum = s.bins + (distance >> shift);
            u32 low = (u32)value, old = atomicAdd(&sum->x, low), high = (u32)(value >> 32) + (old + low < old);
            if (high) atomicAdd(&sum->y, high);
        });
        __syncthreads();
        // Each block adds up a part of the bins, the first one the highest.
        if (threadIdx.x < THREADS / 2) {
            uint4* two = (uint4*)s.bins + threadIdx.x;
            uint4 sums = *two;
            *two = make_uint4(0, 0, 0, 0);
            u32 bin = 2 * threadIdx.x;
            team.send(s.received[(team.block * bins + bin % bins) / 2], team.blocks - 1 - bin / bins,
                      (u64)sums.y << 32 | sums.x, (u64)sums.w << 32 | sums.z);
        }
        team.receive(THREADS / 2);
        u32 bin = bins - 1 - threadIdx.x;
        u64 value = 0;
        if (threadIdx.x < bins)
            for (u32 block = 0; block < team.blocks; ++block) value += ((const u64*)s.received)[block * bins + bin];
        u64 sum = warp_scan(value);
        Place place = place_of(__shfl_sync(ALL_LANES, sum, 31), team);
        sum += place.before;
        if (is_first) target = target_of(place.total - excess);
        if (place.total < target) return within;
        if (sum >= target && sum - value < target)
            for (u32 block = 0; block < team.blocks; ++block) {
                team.send(s.digit[0], block, sum - value, value);
                team.send(s.digit[1], block, (team.blocks - 1 - team.block) * bins + bin);
            }
        team.receive(2);
        target -= s.digit[0].first;
        base += (u32)s.digit[1].first << shift;
        if (shift == 0) {
            u64 each = value_of(__uint_as_float(base));
            return {base, (u32)((target + each - 1) / each), (u32)(s.digit[0].second / each)};
        }
        bits = shift;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) draw_rows(const __grid_constant__ Args a) {
    let_next_begin();
    __shared__ Shared s;
    Team team(s, a.vocab);
    s.bins[threadIdx.x] = make_uint2(0, 0);
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
    float lowest = __uint_as_float(0x7f800000u);
    team.for_own_ids([&](u32 id) {
        float logit = logits[id];
        bool is_in_range = logit >= row.lowest && logit < __uint_as_float(0x7f800000u);
        best = max(best, is_in_range ? logit_key(logit, id) : INVALID);
        lowest = min(lowest, logit);
    });
    // The least logit becomes the largest of keys, too.
    Words largest = {warp_max(best), warp_max(logit_key(-lowest, 0))};
    largest = team.share_in_block(largest.first, largest.second);
    team.begin();
    largest = team.share(warp_max(largest.first), warp_max(largest.second));
    best = warp_max(largest.first);
    u32 token = ~(u32)best;
    float highest = logit_of(best);
    lowest = -logit_of(warp_max(largest.second));

    bool is_valid = best != INVALID && is_finite(highest);
    if (is_valid && row.scale != 0.0f) {
        team.for_own_ids([&](u32 id) { likelihoods[id] = exp_f32((logits[id] - highest) * row.scale); });
        // Below the least key weights are 0. Of two neighbours the exponential may round the larger one down.
        constexpr u32 LEAST_KEY = (127 - 42) << 23, ROUNDINGS = 64;
        Cut cut = {max(LEAST_KEY, __float_as_uint(exp_f32((lowest - highest) * row.scale)) - ROUNDINGS), 0, 0};
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
        if (cut.kept < cut.ties) {
            u32 last = first_exceeding(team, [&](u32 id) { return (u64)(__float_as_uint(likelihoods[id]) == cut.key); },
                                       [&](u64) { return (u64)cut.kept - 1; });
            if (last != NONE && threadIdx.x % 32 < team.blocks) team.send(s.found, threadIdx.x % 32, last);
            team.receive(1);
            last_tie = (u32)s.found.first;
        }
        token = first_exceeding(team, [&](u32 id) {
                                    float likelihood = likelihoods[id];
                                    u32 key = __float_as_uint(likelihood);
                                    u64 weight = weight_of(likelihood);
                                    bool is_kept = key > cut.key || (key == cut.key && id <= last_tie);
                                    return is_kept && weight >= row.min_weight ? weight : 0ull;
                                },
                                [&](u64 total) { return fraction_of(uniform, total); });
        if (token == NONE) return;
    } else if (team.block > 0 || threadIdx.x >= 32) {
        return;
    }

    // By one warp. What comes next needs a token in any case.
    if (!is_valid) token = 0;
    u32 lane = threadIdx.x % 32;
    if (lane == 0) {
        a.drawn[(size_t)pass * count + number] = is_valid ? token : NONE;
        if (a.tokens) a.tokens[number] = token;
        if (row.penalty != 1.0f) recent[known] = token;
    }
    // The decoding kernel takes the largest key; blocks without a part in the head have none.
    u64 key = (u64)NONE << 32 | ((~token & 0x7fffffffu) | a.round << 31);
    for (u32 k = lane; k < a.key_count; k += 32)
        if (a.keys[k]) a.keys[k] = key;
}
