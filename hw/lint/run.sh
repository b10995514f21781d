#!/usr/bin/env bash
# Lints the RTL: Verilator with all warnings, for every configuration; Verible's style rules if it is there.
set -euo pipefail
cd "$(dirname "$0")/.."
verilator=${VERILATOR:-verilator}

while read -r name parameters; do
    echo "verilator -Wall: $name"
    # shellcheck disable=SC2086
    "$verilator" --lint-only -Wall lint/verilator.vlt rtl/mmfree_pkg.sv rtl/mmfree_row_pkg.sv rtl/mmfree_top.sv \
        -y "$PWD/rtl" --top-module mmfree_top $parameters
done <lint/configurations.txt

if command -v "${VERIBLE_LINT:-verible-verilog-lint}" >/dev/null; then
    echo "verible-verilog-lint"
    "${VERIBLE_LINT:-verible-verilog-lint}" --rules_config lint/verible.rules rtl/*.sv dv/*.sv
else
    echo "!!! Verible NOT RUN: no verible-verilog-lint"
fi
