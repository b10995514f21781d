// Runs a program image on the RTL. Prints one JSON object; writes a trace of every instruction on demand.
//
// Exit codes: 0 finished, 2 bad arguments or image, 3 the watchdog found that nothing moves, or the hardware
// raised its error; the state of every unit is then written to standard error.
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "Vmmfree_tb.h"
#include "verilated.h"

namespace {

constexpr size_t kHeader = 256;
constexpr uint64_t kPage = 4096;
constexpr uint32_t kInstructions = 256;
constexpr uint64_t kZeroed = 1 << 29;  // bytes of data memory that are not stored

struct Trace {
  std::vector<uint32_t> vectors;
  uint64_t vector_hash = 0;
  uint32_t scalars[16][2] = {};
  uint32_t addresses[8] = {};
  FILE* file = nullptr;
};

std::vector<std::vector<uint8_t>> memories;  // of each core, then data
std::mt19937_64 generator;
Trace trace;
uint64_t retired = 0;

uint64_t mix(uint64_t index, uint32_t value) {
  uint64_t z = (index * 0x9E3779B97F4A7C15ull) ^ value;
  z = (z ^ (z >> 32)) * 0xD6E8FEB86659FD93ull;
  return z ^ (z >> 32);
}

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "error: %s\n", what.c_str());
  std::exit(2);
}

template <typename T>
T read(const std::vector<uint8_t>& bytes, size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

}  // namespace

extern "C" {

void dram_read(int port, long long address, int bytes, svBitVecVal* data) {
  const auto& memory = memories[port];
  std::memset(data, 0, 128);
  if (address >= 0 && static_cast<uint64_t>(address) + bytes <= memory.size()) {
    std::memcpy(data, memory.data() + address, bytes);
  }
}

void dram_write(long long address, int bytes, const svBitVecVal* data) {
  auto& memory = memories.back();
  if (address >= 0 && static_cast<uint64_t>(address) + bytes <= memory.size()) {
    std::memcpy(memory.data() + address, data, bytes);
  }
}

int dram_chance(int percent) {
  return percent > 0 && static_cast<int>(generator() % 100) < percent;
}

void trace_write(int element, int value) {
  auto& old = trace.vectors[element];
  trace.vector_hash += mix(element, value) - mix(element, old);
  old = value;
}

void trace_scalar(int index, int mantissa, int exponent) {
  trace.scalars[index][0] = mantissa;
  trace.scalars[index][1] = exponent;
}

void trace_address(int index, int value) { trace.addresses[index] = value; }

void trace_retire(int pc) {
  uint64_t registers = 0;
  for (int i = 0; i < 16; i++) {
    registers += mix(2 * i, trace.scalars[i][0]) + mix(2 * i + 1, trace.scalars[i][1]);
  }
  for (int i = 0; i < 8; i++) registers += mix(32 + i, trace.addresses[i]);
  std::fprintf(trace.file, "%d %016" PRIx64 " %016" PRIx64 "\n", pc, trace.vector_hash, registers);
}

}  // extern "C"

int main(int argc, char** argv) {
  std::string image_path, trace_path;
  std::vector<uint32_t> tokens;
  uint64_t latency = 20, stall = 0, rate = 256, seed = 1, generate = 0, watchdog = 100000;
  uint64_t hang_after = UINT64_MAX, fail_after = UINT64_MAX, mutation = 0;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 >= argc) fail(name + " needs a value");
    const std::string value = argv[i + 1];
    const auto number = [&] { return std::strtoull(value.c_str(), nullptr, 10); };
    if (name == "--image") image_path = value;
    else if (name == "--trace") trace_path = value;
    else if (name == "--latency") latency = number();
    else if (name == "--stall") stall = number();
    else if (name == "--rate") rate = number();
    else if (name == "--seed") seed = number();
    else if (name == "--generate") generate = number();
    else if (name == "--watchdog") watchdog = number();
    else if (name == "--hang-after") hang_after = number();
    else if (name == "--fail-after") fail_after = number();
    else if (name == "--mutation") mutation = number();
    else if (name == "--tokens") {
      for (const char* at = value.c_str(); *at;) {
        char* end;
        tokens.push_back(std::strtoul(at, &end, 10));
        at = *end ? end + 1 : end;
      }
    } else fail("unknown option " + name);
  }
  std::ifstream file(image_path, std::ios::binary);
  std::vector<uint8_t> image((std::istreambuf_iterator<char>(file)), {});
  if (image.size() < kHeader || std::memcmp(image.data(), "MMFACCEL", 8)) fail("no program image");
  const uint32_t sizes[] = {CORES,           WEIGHT_BYTES, ROW_LANES,  VECTOR_WORDS,
                            ACTIVATION_BYTES, FIFO_BEATS,  BURST_BEATS};
  for (int i = 0; i < 7; i++) {
    if (read<uint32_t>(image, 16 + 4 * i) != sizes[i]) fail("the image is for other hardware");
  }
  const auto padded = [](uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; };
  const uint32_t instructions = read<uint32_t>(image, 64);
  const uint64_t stored = read<uint64_t>(image, 72), data = read<uint64_t>(image, 80);
  const uint64_t stream = read<uint64_t>(image, 88);
  const auto is_large = [&](uint64_t bytes) { return bytes > image.size(); };
  if (instructions > kInstructions || is_large(stored) || is_large(stream) || data < stored ||
      data - stored > kZeroed ||
      kHeader + padded(instructions * 16) + padded(stored) + CORES * padded(stream) != image.size()) {
    fail("the image is damaged");
  }
  size_t at = kHeader + padded(instructions * 16);
  std::vector<uint8_t> data_memory(image.begin() + at, image.begin() + at + stored);
  data_memory.resize(data);
  at += padded(stored);
  for (int core = 0; core < CORES; core++) {
    memories.emplace_back(image.begin() + at, image.begin() + at + stream);
    memories.back().resize(padded(stream) + kPage);
    at += padded(stream);
  }
  memories.push_back(data_memory);

  trace.vectors.assign(VECTOR_WORDS * ROW_LANES, 0);
  for (size_t i = 0; i < trace.vectors.size(); i++) trace.vector_hash += mix(i, 0);
  if (!trace_path.empty()) {
    trace.file = std::fopen(trace_path.c_str(), "w");
    if (!trace.file) fail("cannot write " + trace_path);
  }
  generator.seed(seed);

  auto context = std::make_unique<VerilatedContext>();
  const std::string chosen = "+mutation=" + std::to_string(mutation);
  const char* plus_arguments[] = {argv[0], chosen.c_str()};
  context->commandArgs(2, plus_arguments);
  auto top = std::make_unique<Vmmfree_tb>(context.get());
  top->trace_i = trace.file != nullptr;
  top->latency_i = latency;
  top->stall_percent_i = stall;
  top->rate_i = rate;
  uint64_t clock = 0;
  const auto tick = [&] {
    top->clk_i = 0;
    top->eval();
    top->clk_i = 1;
    top->eval();
    clock++;
  };
  top->rst_ni = 0;
  for (int i = 0; i < 4; i++) tick();
  top->rst_ni = 1;
  top->imem_we_i = 1;
  for (uint32_t i = 0; i < instructions; i++) {
    top->imem_addr_i = i;
    std::memcpy(&top->imem_data_i, image.data() + kHeader + 16 * i, 16);
    tick();
  }
  top->imem_we_i = 0;
  tick();

  std::vector<uint32_t> results;
  std::vector<uint64_t> cycles;
  const size_t prompt = tokens.size();
  for (size_t turn = 0; turn < tokens.size(); turn++) {
    const uint64_t before = top->cycles_o;
    top->token_i = tokens[turn];
    top->start_i = 1;
    tick();
    top->start_i = 0;
    uint64_t quiet = 0;
    uint8_t last_pc = top->pc_o;
    bool done = false;
    while (!done) {
      top->hang_i = clock >= hang_after;
      top->fail_i = clock >= fail_after;
      // Outputs of the cycle that ends with this edge.
      top->clk_i = 0;
      top->eval();
      done = top->done_o;
      const bool moved = top->retire_o;
      const bool error = top->error_o;
      tick();
      retired += moved;
      quiet = moved ? 0 : quiet + 1;
      last_pc = top->pc_o;
      if (quiet > watchdog || error) {
        std::printf(
            "{\"status\":\"%s\",\"pc\":%d,\"instructions\":%" PRIu64 ",\"cycle\":%" PRIu64
            ",\"token\":%zu,\"starved_cycles\":%" PRIu64 ",\"full_cycles\":%" PRIu64 "}\n",
            error ? "error" : "hung", last_pc, retired, clock, turn,
            static_cast<uint64_t>(top->starved_cycles_o), static_cast<uint64_t>(top->full_cycles_o));
        std::fflush(stdout);
        std::fprintf(stderr, "%s at cycle %" PRIu64 ", %" PRIu64 " cycles after the last instruction\n",
                     error ? "error" : "hung", clock, quiet);
        top->dump_i = 1;
        tick();
        return 3;
      }
    }
    results.push_back(top->token_o);
    cycles.push_back(top->cycles_o - before);
    if (trace.file) {
      uint64_t hash = 0;
      const auto& memory = memories.back();
      for (size_t i = 0; i + 4 <= memory.size(); i += 4) hash += mix(i / 4, read<uint32_t>(memory, i));
      std::fprintf(trace.file, "token %u data %016" PRIx64 "\n", top->token_o, hash);
    }
    if (turn + 1 >= prompt && turn + 1 < prompt + generate - (generate > 0)) {
      tokens.push_back(top->token_o);
    }
  }
  const auto list = [](const auto& values) {
    std::string text;
    for (const auto& value : values) text += (text.empty() ? "" : ",") + std::to_string(value);
    return text;
  };
  std::printf("{\"status\":\"ok\",\"results\":[%s],\"cycles\":[%s],\"instructions\":%" PRIu64
              ",\"starved_cycles\":%" PRIu64 ",\"full_cycles\":%" PRIu64 "}\n",
              list(results).c_str(), list(cycles).c_str(), retired,
              static_cast<uint64_t>(top->starved_cycles_o),
              static_cast<uint64_t>(top->full_cycles_o));
  if (trace.file) std::fclose(trace.file);
  top->final();
  return 0;
}
