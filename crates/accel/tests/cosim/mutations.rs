//! Faults that are put into a copy of the RTL, all at once: each stands beside the right expression and is chosen
//! when the program starts (`+mutation=K`, none for 0), so that one build serves them all.

use std::path::{Path, PathBuf};

use crate::support;

/// Instead of a unit bench: only the comparison of whole programs can find the fault.
pub const PROGRAM: &str = "program";

/// A fault: an expression that stands exactly once in a file, and what takes its place.
pub struct Mutation {
    pub what: &'static str,
    /// The unit bench that has to find it, or [`PROGRAM`].
    pub bench: &'static str,
    pub file: &'static str,
    from: &'static str,
    to: &'static str,
}

macro_rules! mutations {
    ($($bench:literal $file:literal $what:literal: $from:literal => $to:literal;)*) => {
        /// All faults; number K is `+mutation=K+1`.
        pub const ALL: &[Mutation] = &[$(Mutation {
            what: $what,
            bench: $bench,
            file: concat!("mmfree_", $file, ".sv"),
            from: $from,
            to: $to,
        }),*];
    };
}

mutations! {
    "round" "round_saturate" "ties rounded down": "value_i + half" => "value_i + half - 64'sd1";
    "round" "round_saturate" "no saturation below": "shifted < -64'sh8000_0000" => "1'b0";
    "trits" "trit_decoder" "+1 of t2 is lost": "byte_i[2*i+:2] == 2'd0 || byte_i[2*i+:2] == 2'd2" => "byte_i[2*i+:2] == 2'd0";
    "trits" "trit_decoder" "the table's neighbour": "TritTable5[byte_i]" => "TritTable5[byte_i ^ 8'd1]";
    "tree" "adder_tree" "the second sign is lost": "terms[2*i+1][InWidth-1]" => "1'b0";
    "vectors" "vector_memory" "all lanes follow the first's enable": "we_i[lane]" => "we_i[0]";
    "fifo" "fifo" "one entry too few": "wptr_q == {~rptr_q[AddrWidth], rptr_q[AddrWidth-1:0]}" => "wptr_q - rptr_q == (AddrWidth+1)'(Depth-1)";
    "fifo" "fifo" "the head stays": "fetch || (valid_o && !ready_i)" => "fetch || valid_o";
    "lane" "lane" "sigmoid of negative numbers": "a2_q[31] ? One - positive : positive" => "positive";
    "lane" "lane" "sign of the recurrence": "subtract_saturate(c5_q, m5_q)" => "subtract_saturate(m5_q, c5_q)";
    "lane" "lane" "the last of equals wins": "a1_q > best_value_o" => "a1_q >= best_value_o";
    "lane" "lane" "-128 of the quantiser": "side8_q < -32'sd127" => "side8_q < -32'sd128";
    "rms" "rms_unit" "one step of the mean too few": "step_q == 6'd63" => "step_q == 6'd62";
    "rms" "rms_unit" "trial of the root": "root_rest >= root_trial" => "root_rest > root_trial";
    "rms" "rms_unit" "exponent of the quantiser": "7'd55 - shift_q" => "7'd54 - shift_q";
    "rms" "rms_unit" "no floor of the quantiser": "maximum_i < QuantFloor" => "maximum_i < 32'd1";
    "row" "row_unit" "one element too many counts": "element < 32'(n_q)" => "element <= 32'(n_q)";
    "row" "row_unit" "the last word is left out": "finished_q + 1'b1 == words" => "finished_q + 2'd2 >= words";
    "row" "row_unit" "sums of lanes are taken away": "sum_q + lane_sum[lane_q]" => "sum_q - lane_sum[lane_q]";
    "ternary" "ternary_unit" "sign of a trit": "trits[r][1] ? -act_q[k] : act_q[k]" => "trits[r][1] ? act_q[k] : -act_q[k]";
    "ternary" "ternary_unit" "one beat too few": "beat_q + 1'b1 == beats_q" => "beat_q + 2'd2 >= beats_q";
    "ternary" "ternary_unit" "sums run on": "acc_first ? '0 : acc_q[r]" => "acc_q[r]";
    "reader" "weight_reader" "more than the FIFO holds": "reserved_q + burst <= CountWidth'(FifoBeats)" => "reserved_q <= CountWidth'(FifoBeats)";
    "reader" "weight_reader" "one beat too many": "8'(burst - 1'b1)" => "8'(burst)";
    "reader" "weight_reader" "full while the memory owes weights": "pending_q == '0" => "1'b1";
    "data" "data_port" "bursts cross pages": "13'(burst) > page" => "1'b0";
    "data" "data_port" "the last beat is marked early": "beat_q == 9'd1" => "beat_q == 9'd2";
    "writeback" "writeback" "one group too many": "row_q + 17'(group_rows) >= {1'b0, rows_q}" => "row_q + 17'(group_rows) > {1'b0, rows_q}";
    "writeback" "writeback" "one element further": "first3_q + 17'(s)" => "first3_q + 17'(s) + 17'd1";
    "control" "control" "one turn too few": "inner.left == '0" => "inner.left <= 32'd1";
    "control" "control" "one turn too many": "imm == '0 ? '0 : imm - 1'b1" => "imm";
    "control" "control" "the offset is left out": "instruction_q[IndexedLow] ? offset_q : '0" => "16'd0";
    "program" "top" "stores begin at the destination": "opcode == OpStore ? va : vd" => "vd";
}

/// A copy of the RTL with every fault in it, under `folder`.
pub fn mutated_rtl(folder: &Path) -> PathBuf {
    let target = folder.join("rtl");
    std::fs::create_dir_all(&target).unwrap();
    for entry in std::fs::read_dir(support::hardware().join("rtl")).unwrap() {
        let path = entry.unwrap().path();
        let mut text = std::fs::read_to_string(&path).unwrap();
        for (index, mutation) in ALL.iter().enumerate() {
            if path.ends_with(mutation.file) {
                let Mutation { what, file, from, to, .. } = mutation;
                assert_eq!(text.matches(from).count(), 1, "{file} has changed: {what}");
                let number = index + 1;
                let chosen =
                    format!("(mmfree_mutation_pkg::active == {number} ? ({to}) : ({from}))");
                text = text.replace(from, &chosen);
            }
        }
        std::fs::write(target.join(path.file_name().unwrap()), text).unwrap();
    }
    let package = "package mmfree_mutation_pkg;\n  int active = 0;\nendpackage\n";
    std::fs::write(target.join("mmfree_mutation_pkg.sv"), package).unwrap();
    target
}
