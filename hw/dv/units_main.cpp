// Clocks the bench of single modules. Reads a line for each cycle, "RESET UNIT INPUTS" (inputs in hexadecimal,
// 128 digits), and prints the outputs before the clock's edge in the same form.
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>

#include "Vmmfree_units_tb.h"
#include "verilated.h"

int main(int argc, char** argv) {
  auto context = std::make_unique<VerilatedContext>();
  context->commandArgs(argc, argv);
  auto top = std::make_unique<Vmmfree_units_tb>(context.get());
  int reset = 0, unit = 0;
  char digits[129];
  while (std::scanf("%d %d %128s", &reset, &unit, digits) == 3) {
    const std::string text = digits;
    if (text.size() != 128) return 2;
    for (int word = 0; word < 16; word++) {
      const auto part = text.substr(8 * (15 - word), 8);
      top->in_i[word] = static_cast<uint32_t>(std::stoul(part, nullptr, 16));
    }
    top->rst_ni = !reset;
    top->unit_i = unit;
    top->clk_i = 0;
    top->eval();
    for (int word = 15; word >= 0; word--) std::printf("%08x", static_cast<unsigned>(top->out_o[word]));
    std::printf("\n");
    std::fflush(stdout);
    top->clk_i = 1;
    top->eval();
  }
  top->final();
  return 0;
}
