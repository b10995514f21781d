// Sum of signed numbers, pipelined: one level of adders a cycle, latency $clog2(Inputs).
module mmfree_adder_tree #(
  parameter int unsigned Inputs = 8,  // a power of two, at least 2
  parameter int unsigned Width  = 8,
  localparam int unsigned Levels   = $clog2(Inputs),
  localparam int unsigned SumWidth = Width + Levels
) (
  input  logic                           clk_i,
  input  logic                           en_i,
  input  logic [Inputs-1:0][Width-1:0]   terms_i,
  output logic signed [SumWidth-1:0]     sum_o
);

  for (genvar level = 0; level < Levels; level++) begin : gen_level
    localparam int unsigned Terms = Inputs >> (level + 1);
    localparam int unsigned InWidth = Width + level;
    logic [2*Terms-1:0][InWidth-1:0] terms;
    logic [Terms-1:0][InWidth:0]     sums_q;

    if (level == 0) begin : gen_first
      assign terms = terms_i;
    end else begin : gen_next
      assign terms = gen_level[level-1].sums_q;
    end

    always_ff @(posedge clk_i) begin
      if (en_i) begin
        for (int unsigned i = 0; i < Terms; i++) begin
          sums_q[i] <= {terms[2*i][InWidth-1], terms[2*i]} +
                       {terms[2*i+1][InWidth-1], terms[2*i+1]};
        end
      end
    end
  end

  assign sum_o = gen_level[Levels-1].sums_q;

endmodule
