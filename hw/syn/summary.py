"""Prints what a Yosys `stat -json` found: look-up tables, registers, memories, multipliers. Fails on latches."""

import json
import sys

KINDS = {
    "LUT": ("LUT4", "LUT1", "LUT2", "LUT3", "LUT5", "LUT6", "CCU2C", "MISTRAL_ALUT", "MISTRAL_NOT"),
    "registers": ("TRELLIS_FF", "FDRE", "FDSE", "FDCE", "FDPE", "MISTRAL_FF"),
    "distributed RAM": ("TRELLIS_DPR16X4", "RAM32M", "RAM64M", "RAM32X1D", "RAM64X1D", "MISTRAL_MLAB"),
    "block RAM": ("DP16KD", "PDPW16KD", "RAMB18E2", "RAMB36E2", "MISTRAL_M10K"),
    "multipliers": ("MULT18X18D", "ALU54B", "DSP48E2", "MISTRAL_MUL"),
}


def count(cells, prefixes):
    return sum(number for cell, number in cells.items() if cell.startswith(prefixes))


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        design = json.load(file)["design"]
    cells = design["num_cells_by_type"]
    # An ECP5 carry cell takes two look-up tables.
    for kind, prefixes in KINDS.items():
        number = count(cells, prefixes) + (cells.get("CCU2C", 0) if kind == "LUT" else 0)
        print(f"  {kind:16} {number}")
    latches = [cell for cell in cells if "LATCH" in cell.upper() or cell.startswith(("LDCE", "LDPE"))]
    if latches:
        sys.exit(f"there are latches: {', '.join(latches)}")


if __name__ == "__main__":
    main()
