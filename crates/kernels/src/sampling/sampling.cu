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

// Sixteen bytes, as they are sent.
struct __align__(16) Words {
    u64 first;
    u64 second;
};

struct Shared {
    __align__(16) uint2 bins[THREADS];  // of this block: low and high words of sums
    Words received[THREADS / 2];        // bins that this block adds up, of each block
    Words shares[ROUNDS][MAX_BLOCKS];
    Words digit[2];  // the sums above the cut's bin and in it; the bin
    Words found;
    Words parts[WARPS];
    u64 round_over[ROUNDS];
    Row row;
    u64 word;  // the random one
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
        ids = over_blocks((vocab + blocks * THREADS - 1) / THREADS) * 32;
    }

    // A block's share: their number is a power of two.
    __device__ __forceinline__ u32 over_blocks(u32 count) const { return count >> (__ffs(blocks) - 1); }

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

    // Ends a round: waits for so many times sixteen bytes.
    __device__ __forceinline__ void receive(u32 count) {
        if (blocks == 1) __syncthreads();
        else wait_for_bytes(16 * count);
        ++round;
    }

    __device__ __forceinline__ void wait_for_bytes(u32 count) const {
#if __CUDA_ARCH__ >= 900
        u32 barrier = shared_address(s.round_over + round % ROUNDS);
        if (threadIdx.x == 0) expect_bytes(barrier, count);
        wait_for(barrier, round / ROUNDS % 2);
#endif
    }

    // First id of this warp, and the one behind its last.
    __device__ __forceinline__ u32 first_id() const { return min((block * WARPS + threadIdx.x / 32) * ids, vocab); }
    __device__ __forceinline__ u32 end_id() const { return min(first_id() + ids, vocab); }

    // Calls f with each id of this thread and what a row has there. Four are on their way at a time.
    template <class F>
    __device__ __forceinline__ void for_own(const float* row, F f) const {
        u32 end = end_id();
#pragma unroll 1
        for (u32 id = first_id() + threadIdx.x % 32; id < end; id += 4 * 32) {
            float of_id[4];
#pragma unroll
            for (u32 k = 0; k < 4; ++k)
                if (id + 32 * k < end) of_id[k] = row[id + 32 * k];
#pragma unroll
            for (u32 k = 0; k < 4; ++k)
                if (id + 32 * k < end) f(id + 32 * k, of_id[k]);
        }
    }

    // Gives each warp what the first one makes for it, in lane k for warp k, of what warp k has. In that it can share with other
    // blocks: a round.
    template <class F>
    __device__ __forceinline__ Words through_first_warp(Words of_warp, F make) {
        u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        __syncwarp();
        if (lane == 0) s.parts[warp] = of_warp;
        __syncthreads();
        if (warp == 0) s.parts[lane] = make(s.parts[lane]);
        __syncthreads();
        ++round;
        return s.parts[warp];
    }

    // By the first warp: gives lane k what block k has, lanes without a block zeros.
    __device__ __forceinline__ Words share(Words words) const {
        u32 lane = threadIdx.x;
        if (blocks == 1) return lane == 0 ? words : Words{0, 0};
        Words(&shares)[MAX_BLOCKS] = s.shares[round % ROUNDS];
        if (lane < blocks) send(shares[block], lane, words.first, words.second);
        wait_for_bytes(16 * blocks);
        return lane < blocks ? shares[lane] : Words{0, 0};
    }
};

__device__ __forceinline__ u64 warp_sum(u64 value) {
#pragma unroll
    for (u32 width = 16; width > 0; width /= 2) value += __shfl_xor_sync(ALL_LANES, value, width);
    return value;
}

__device__ __forceinline__ u64 warp_max(u64 value) {
    u32 high = __reduce_max_sync(ALL_LANES, (u32)(value >> 32));
    return (u64)high << 32 | __reduce_max_sync(ALL_LANES, (u32)(value >> 32) == high ? (u32)value : 0);
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

// Where a warp's sum begins among those of the warps of all blocks, and the sum of all: first and second.
__device__ __forceinline__ Words place_of(u64 value_of_warp, Team& team) {
    return team.through_first_warp({value_of_warp, 0}, [&](Words of_warp) {
        u64 scan = warp_scan(of_warp.first), in_block = __shfl_sync(ALL_LANES, scan, 31);
        u64 of_block = team.share({in_block, 0}).first, of_blocks = warp_scan(of_block);
        u64 before = __shfl_sync(ALL_LANES, of_blocks - of_block, team.block);
        return Words{before + scan - of_warp.first, __shfl_sync(ALL_LANES, of_blocks, 31)};
    });
}

// ---- Drawing ----

__device__ __forceinline__ u64 weight_of(float likelihood) { return __float2ull_rn(likelihood * 1099511627776.0f); }

// Of a key's upper half.
__device__ __forceinline__ float logit_of(u32 bits) {
    return __uint_as_float(bits ^ (bits >> 31 ? 0x80000000u : NONE));
}

constexpr u32 FRACTION_BITS = 53;

// floor(a b / 2^53) for b up to 2^63 and a up to 2^53.
__device__ __forceinline__ u64 fraction_of(u64 a, u64 b) {
    return __umul64hi(a, b) << (64 - FRACTION_BITS) | a * b >> FRACTION_BITS;
}

// The sum of weights that is enough for top-p.
__device__ __forceinline__ u64 enough(u64 top_p, u64 total) {
    bool has_rest = top_p * total & (1ull << FRACTION_BITS) - 1;
    return max(fraction_of(top_p, total) + has_rest, 1ull);
}

// Where the order of likelihoods is cut: those above the key are kept, and `kept` of the `ties` at it, lower ids first.
struct Cut {
    u32 key;
    u32 kept;
    u32 ties;
};

// Goes down the likelihoods that a cut keeps until their number is top-k or the sum of their weights is what top-p asks for,
// and cuts there. Their bits are in their order, and so are the bits' distances from the least one that counts: it goes digit
// by digit, as many as these distances have.
__device__ __forceinline__ void cut_further(Team& team, const float* likelihoods, bool counts, Cut& cut) {
    constexpr u32 DIGIT = 10;
    static_assert(THREADS == 1 << DIGIT, "a bin a thread");
    Shared& s = team.s;
    auto value_of = [&](float likelihood) { return counts ? 1 : weight_of(likelihood); };
    // Of ties that are not kept.
    u64 excess = (cut.ties - cut.kept) * value_of(__uint_as_float(cut.key)), target = 0;
    u32 base = cut.key, bits = 32 - __clz(__float_as_uint(1.0f) - base), bins = team.over_blocks(THREADS);
#pragma unroll 1
    for (bool is_first = true;; is_first = false) {
        u32 shift = bits > DIGIT ? bits - DIGIT : 0;
        team.for_own(likelihoods, [&](u32, float likelihood) {
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
            u32 bin = 2 * threadIdx.x, part = bin * team.blocks / THREADS;
            team.send(s.received[(team.block * bins + bin - part * bins) / 2], team.blocks - 1 - part,
                      (u64)sums.y << 32 | sums.x, (u64)sums.w << 32 | sums.z);
        }
        team.receive(THREADS / 2);
        u32 bin = bins - 1 - threadIdx.x;
        u64 value = 0, sum = 0;
        if (threadIdx.x < bins) {
#pragma unroll 1
            for (u32 block = 0; block < team.blocks; ++block) value += ((const u64*)s.received)[block * bins + bin];
            sum = warp_scan(value);
        }
        Words place = place_of(__shfl_sync(ALL_LANES, sum, 31), team);
        sum += place.first;
        if (is_first) {
            u64 total = place.second - excess;
            target = counts ? s.row.top_k : enough(s.row.top_p, total);
            if (total < target) return;
        }
        if (sum >= target && sum - value < target)
#pragma unroll 1
            for (u32 block = 0; block < team.blocks; ++block) {
                team.send(s.digit[0], block, sum - value, value);
                team.send(s.digit[1], block, (team.blocks - 1 - team.block) * bins + bin);
            }
        team.receive(2);
        target -= s.digit[0].first;
        base += (u32)s.digit[1].first << shift;
        if (shift == 0) {
            u64 each = value_of(__uint_as_float(base));
            cut = {base, (u32)((target + each - 1) / each), (u32)(s.digit[0].second / each)};
            return;
        }
        bits = shift;
    }
}

// The first id at which the sum of values up to it exceeds a threshold, which comes from their total. There is one. The warp
// that has it gets it, others NONE.
template <class Value, class Threshold>
__device__ __forceinline__ u32 first_exceeding(Team& team, const float* likelihoods, Value value, Threshold threshold_of) {
    u32 lane = threadIdx.x % 32;
    u64 sum = 0;
    team.for_own(likelihoods, [&](u32 id, float likelihood) { sum += value(id, likelihood); });
    sum = warp_sum(sum);
    Words place = place_of(sum, team);
    u64 threshold = threshold_of(place.second);
    if (threshold < place.first || threshold >= place.first + sum) return NONE;
    // A lane has neighbours of the warp's ids ...
    u32 own = team.ids / 32, first = team.first_id() + lane * own;
    u64 of_lane = 0;
#pragma unroll 1
    for (u32 id = first; id < min(first + own, team.end_id()); ++id) of_lane += value(id, likelihoods[id]);
    u64 scan = place.first + warp_scan(of_lane);
    u32 which = __ffs(__ballot_sync(ALL_LANES, scan > threshold)) - 1;
    u64 before = __shfl_sync(ALL_LANES, scan - of_lane, which);
    first = __shfl_sync(ALL_LANES, first, which);
    // ... and those of one lane are among all.
#pragma unroll 1
    for (u32 end = min(first + own, team.end_id());; first += 32) {
        u32 id = first + lane;
        scan = before + warp_scan(id < end ? value(id, likelihoods[id]) : 0);
        u32 exceeding = __ballot_sync(ALL_LANES, scan > threshold);
        if (exceeding) return first + __ffs(exceeding) - 1;
        before = __shfl_sync(ALL_LANES, scan, 31);
    }
}

// Draws from likelihoods, of which those below a key have no weight. The warp that has the token gets it, others NONE.
__device__ __forceinline__ u32 draw(Team& team, const float* likelihoods, u32 least_key) {
    const Row& row = team.s.row;
    Cut cut = {least_key, 0, 0};
#pragma unroll 1
    for (u32 by_weight = 0; by_weight < 2; ++by_weight)
        if (by_weight ? row.top_p < 1ull << FRACTION_BITS : row.top_k > 0 && row.top_k < team.vocab)
            cut_further(team, likelihoods, !by_weight, cut);
    u32 last_tie = NONE, lane = threadIdx.x % 32;
#pragma unroll 1
    for (bool of_ties = cut.kept < cut.ties;; of_ties = false) {
        auto value = [&](u32 id, float likelihood) {
            u32 key = __float_as_uint(likelihood);
            u64 weight = weight_of(likelihood);
            if (of_ties) return (u64)(key == cut.key);
            bool is_kept = key > cut.key || (key == cut.key && id <= last_tie);
            return is_kept && weight >= row.min_weight ? weight : 0;
        };
        u32 id = first_exceeding(team, likelihoods, value, [&](u64 total) {
            return of_ties ? cut.kept - 1 : fraction_of(team.s.word >> (64 - FRACTION_BITS), total);
        });
        if (!of_ties) return id;
        if (id != NONE && lane < team.blocks) team.send(team.s.found, lane, id);
        team.receive(1);
        last_tie = (u32)team.s.found.first;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) draw_rows(const __grid_constant__ Args a) {
    let_next_begin();
    __shared__ Shared s;
    Team team(s, a.vocab);
    s.bins[threadIdx.x] = make_uint2(0, 0);
    wait_for_previous();
    u32 number = team.over_blocks(blockIdx.x), count = team.over_blocks(gridDim.x), vocab = a.vocab;
    const Row row = a.rows[number];
    u32 pass = a.passes ? *a.passes - 1 : a.pass;
    u64 word = a.words[(size_t)pass * count + number];
    float* logits = a.logits + (size_t)row.row * vocab;
    float* likelihoods = a.likelihoods + (size_t)number * vocab;
    if (row.penalty != 1.0f) {
        // A token that comes twice is computed twice, from the same logit.
        u32 known = row.recent_len + pass, window = min(row.window, known), id = NONE;
        float logit = 0.0f;
        if (threadIdx.x < window) id = a.recent[row.recent_at + known - window + threadIdx.x];
        u32 ids_of_block = WARPS * team.ids;
        bool has = id < vocab && id - team.block * ids_of_block < ids_of_block;
        if (has) logit = logits[id];
        __syncthreads();
        if (has) logits[id] = logit > 0.0f ? logit / row.penalty : logit * row.penalty;
        __syncthreads();
    }

    u64 best = 0;
    float lowest = __uint_as_float(0x7f800000u);
    team.for_own(logits, [&](u32 id, float logit) {
        bool is_in_range = logit >= row.lowest && logit < __uint_as_float(0x7f800000u);
        best = max(best, is_in_range ? logit_key(logit, id) : INVALID);
        lowest = min(lowest, logit);
    });
    if (threadIdx.x == 0) s.row = row, s.word = word;
    // The least logit becomes the largest of keys, too.
    Words extremes = {warp_max(best), __reduce_max_sync(ALL_LANES, (u32)(logit_key(-lowest, 0) >> 32))};
    team.begin();
    extremes = team.through_first_warp(extremes, [&](Words of_warp) {
        auto largest = [](Words of_lane) {
            return Words{warp_max(of_lane.first), __reduce_max_sync(ALL_LANES, (u32)of_lane.second)};
        };
        return largest(team.share(largest(of_warp)));
    });
    best = extremes.first;
    u32 token = ~(u32)best;
    float highest = logit_of(best >> 32);
    bool is_valid = best != INVALID && is_finite(highest);
    if (is_valid && row.scale != 0.0f) {
        auto likelihood_of = [&](float logit) { return exp_f32((logit - highest) * row.scale); };
        team.for_own(logits, [&](u32 id, float logit) { likelihoods[id] = likelihood_of(logit); });
        // Below the least key weights are 0. Of two neighbours the exponential may round the larger one down.
        constexpr u32 LEAST_KEY = (127 - 42) << 23, ROUNDINGS = 64;
        u32 lowest_key = __float_as_uint(likelihood_of(-logit_of(extremes.second))) - ROUNDINGS;
        token = draw(team, likelihoods, max(LEAST_KEY, lowest_key));
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
        if (s.row.penalty != 1.0f) a.recent[s.row.recent_at + s.row.recent_len + pass] = token;
    }
    // The decoding kernel takes the largest key; blocks without a part in the head have none.
    u64 key = (u64)NONE << 32 | ((~token & 0x7fffffffu) | a.round << 31);
    for (u32 k = lane; k < a.key_count; k += 32)
        if (a.keys[k]) a.keys[k] = key;
}
