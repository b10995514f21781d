// One lane of the row-wise unit: two multipliers in line behind a piecewise sigmoid, and reductions.
// Takes an element of each source a cycle; the result leaves LaneLatency cycles later.
module mmfree_lane
  import mmfree_pkg::*;
  import mmfree_row_pkg::*;
(
  input  logic               clk_i,

  // Constant during a pass
  input  pass_e              pass_i,
  input  scale_t             scale_i,
  // Begins a pass: reductions forget
  input  logic               clear_i,

  // Elements; `count_i`: they take part in reductions
  input  logic               count_i,
  input  logic        [31:0] index_i,
  input  logic signed [31:0] a_i,
  input  logic signed [31:0] b_i,
  input  logic signed [31:0] c_i,

  // Result
  output logic        [31:0] result_o,
  output logic        [7:0]  quant_o,

  // Reductions, complete when the last result has left
  output logic        [63:0] sum_o,
  output logic        [31:0] max_o,
  output logic signed [31:0] best_value_o,
  output logic        [31:0] best_index_o
);

  localparam logic signed [31:0] One = 32'sd1 << FractionBits;

  function automatic logic signed [31:0] add_saturate(logic signed [31:0] x,
                                                      logic signed [31:0] y);
    logic signed [32:0] sum;
    sum = 33'(x) + 33'(y);
    if (sum > 33'sh7fff_ffff) return 32'sh7fff_ffff;
    if (sum < -33'sh8000_0000) return 32'sh8000_0000;
    return sum[31:0];
  endfunction

  function automatic logic signed [31:0] subtract_saturate(logic signed [31:0] x,
                                                           logic signed [31:0] y);
    logic signed [32:0] difference;
    difference = 33'(x) - 33'(y);
    if (difference > 33'sh7fff_ffff) return 32'sh7fff_ffff;
    if (difference < -33'sh8000_0000) return 32'sh8000_0000;
    return difference[31:0];
  endfunction

  // Stage 1: the sigmoid's segment.
  logic        [31:0] magnitude;
  logic signed [31:0] a1_q, b1_q, c1_q;
  logic        [31:0] magnitude1_q, index1_q;
  logic        [35:0] segment1_q;
  logic               count1_q;

  assign magnitude = a_i[31] ? -a_i : a_i;

  always_ff @(posedge clk_i) begin
    a1_q         <= a_i;
    b1_q         <= b_i;
    c1_q         <= c_i;
    magnitude1_q <= magnitude;
    segment1_q   <= SigmoidTable[magnitude[23:16]];
    index1_q     <= index_i;
    count1_q     <= count_i;
  end

  // Stage 2: interpolation.
  logic signed [31:0] a2_q, b2_q, c2_q;
  logic        [20:0] inside2_q;
  logic               beyond2_q, count2_q;

  always_ff @(posedge clk_i) begin
    a2_q      <= a1_q;
    b2_q      <= b1_q;
    c2_q      <= c1_q;
    inside2_q <= segment1_q[35:15] + 21'((31'(segment1_q[14:0]) * 31'(magnitude1_q[15:0])) >> 16);
    beyond2_q <= magnitude1_q[31:24] != '0;
    count2_q  <= count1_q;
  end

  // Stage 3: operands of the first multiplier.
  logic signed [31:0] positive, sigmoid;
  logic signed [31:0] x3_q, y3_q, b3_q, c3_q, side3_q;
  logic               count3_q;

  assign positive = beyond2_q ? One : signed'({11'b0, inside2_q});
  assign sigmoid  = a2_q[31] ? One - positive : positive;

  always_ff @(posedge clk_i) begin
    x3_q <= a2_q;
    unique case (pass_i)
      PassSquare:          y3_q <= a2_q;
      PassMul:             y3_q <= b2_q;
      PassNorm, PassQuant: y3_q <= signed'({1'b0, scale_i.mantissa});
      PassGate: begin
        x3_q <= b2_q;
        y3_q <= One - sigmoid;
      end
      default:             y3_q <= sigmoid;
    endcase
    side3_q  <= pass_i == PassAdd ? add_saturate(a2_q, b2_q) : sigmoid;
    b3_q     <= b2_q;
    c3_q     <= c2_q;
    count3_q <= count2_q;
  end

  // Stages 4 and 5: product, rounded.
  logic signed [63:0] product4_q, product7_q;
  logic        [31:0] rounded4, rounded7;
  logic signed [31:0] b4_q, c4_q, side4_q;
  logic signed [31:0] m5_q, b5_q, c5_q, side5_q;
  logic               count4_q;
  logic        [5:0]  shift;

  assign shift = pass_i == PassNorm || pass_i == PassQuant ? scale_i.exponent : 6'(FractionBits);

  mmfree_round_saturate u_round_first (
    .value_i(product4_q),
    .shift_i(shift),
    .value_o(rounded4)
  );

  always_ff @(posedge clk_i) begin
    product4_q <= 64'(x3_q) * 64'(y3_q);
    b4_q       <= b3_q;
    c4_q       <= c3_q;
    side4_q    <= side3_q;
    count4_q   <= count3_q;
    m5_q       <= signed'(rounded4);
    b5_q       <= b4_q;
    c5_q       <= c4_q;
    side5_q    <= side4_q;
  end

  // Stage 6: operands of the second multiplier, and what passes it by.
  logic signed [31:0] x6_q, y6_q, side6_q, side7_q, side8_q, m8_q;

  always_ff @(posedge clk_i) begin
    x6_q <= pass_i == PassRecur ? subtract_saturate(c5_q, m5_q) : m5_q;
    y6_q <= b5_q;
    unique case (pass_i)
      PassAdd, PassSigmoid: side6_q <= side5_q;
      PassGate:             side6_q <= add_saturate(m5_q, side5_q);
      default:              side6_q <= m5_q;
    endcase
  end

  mmfree_round_saturate u_round_second (
    .value_i(product7_q),
    .shift_i(6'(FractionBits)),
    .value_o(rounded7)
  );

  // Stages 7 to 9: product, rounded; result.
  always_ff @(posedge clk_i) begin
    product7_q <= 64'(x6_q) * 64'(y6_q);
    side7_q    <= side6_q;
    m8_q       <= signed'(rounded7);
    side8_q    <= side7_q;
    unique case (pass_i)
      PassNorm, PassSwiGlu: result_o <= m8_q;
      PassRecur:            result_o <= add_saturate(m8_q, side8_q);
      default:              result_o <= side8_q;
    endcase
    quant_o <= side8_q[7:0];
    if (side8_q > 32'sd127) quant_o <= 8'd127;
    if (side8_q < -32'sd127) quant_o <= 8'h81;
  end

  // Reductions.
  always_ff @(posedge clk_i) begin
    if (clear_i) begin
      sum_o        <= '0;
      max_o        <= '0;
      best_value_o <= 32'sh8000_0000;
      best_index_o <= '0;
    end else begin
      if (count4_q) sum_o <= sum_o + (64'(product4_q) >> SquareShift);
      if (count1_q && magnitude1_q > max_o) max_o <= magnitude1_q;
      if (count1_q && a1_q > best_value_o) begin
        best_value_o <= a1_q;
        best_index_o <= index1_q;
      end
    end
  end

endmodule
