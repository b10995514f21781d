// Takes the cores' sums in turn, scales them and writes them to vector memory.
//
// A group's sums are neighbouring elements that may begin in any lane, so each is written under an
// address of its own. Multiplies as many sums a cycle as there are lanes, at most the five of a group.
module mmfree_writeback
  import mmfree_pkg::*;
#(
  parameter int unsigned RowLanes  = 2,
  parameter int unsigned Words     = 1024,
  parameter int unsigned Cores     = 1,
  localparam int unsigned AccWidth  = 24,
  localparam int unsigned AddrWidth = $clog2(Words)
) (
  input  logic                                clk_i,
  input  logic                                rst_ni,

  // Command: results of a matrix of n rows
  input  logic                                cmd_valid_i,
  output logic                                cmd_ready_o,
  input  logic                                cmd_is_t5_i,
  input  logic [15:0]                         cmd_rows_i,
  input  logic [AddrWidth-1:0]                cmd_word_i,
  input  scale_t                              cmd_scale_i,
  output logic                                done_o,

  // Sums
  input  logic [Cores-1:0]                    sum_valid_i,
  output logic [Cores-1:0]                    sum_ready_o,
  input  logic [Cores-1:0][4:0][AccWidth-1:0] sum_data_i,

  // Write
  output logic [RowLanes-1:0]                 we_o,
  output logic [RowLanes-1:0][AddrWidth-1:0]  waddr_o,
  output logic [RowLanes-1:0][31:0]           wdata_o
);

  localparam int unsigned Slots     = RowLanes < 5 ? RowLanes : 5;
  localparam int unsigned CoreWidth = Cores > 1 ? $clog2(Cores) : 1;
  localparam int unsigned LaneWidth = RowLanes > 1 ? $clog2(RowLanes) : 1;
  localparam int unsigned LaneShift = $clog2(RowLanes);

  logic                 busy_q, is_t5_q;
  logic [15:0]          rows_q;
  logic [AddrWidth-1:0] word_q;
  scale_t               scale_q;
  logic [CoreWidth-1:0] core_q;
  logic [16:0]          row_q;   // first row of the group
  logic [2:0]           slot_q;  // first sum of the group that is handled now
  logic [2:0]           group_rows;
  logic                 take, last_slot, last_core, last_group;
  logic [4:0][AccWidth-1:0] group;

  assign cmd_ready_o = !busy_q;
  assign group_rows  = is_t5_q ? 3'd5 : 3'd4;
  assign group       = sum_data_i[core_q];
  assign take        = busy_q && sum_valid_i[core_q];
  assign last_slot   = 4'(slot_q) + 4'(Slots) >= 4'(group_rows);
  assign last_core   = core_q == CoreWidth'(Cores - 1);
  assign last_group  = row_q + 17'(group_rows) >= {1'b0, rows_q};

  always_comb begin
    sum_ready_o = '0;
    sum_ready_o[core_q] = busy_q && last_slot;
  end

  // Stage 1: the sums, and where they go.
  logic                             valid1_q, valid2_q, valid3_q;
  logic [Slots-1:0][AccWidth-1:0]   sum1_q;
  logic [Slots-1:0]                 used1_q, used2_q, used3_q;
  logic [16:0]                      first1_q, first2_q, first3_q;
  // Stage 2: products. Stage 3: elements.
  logic signed [Slots-1:0][55:0]    product2_q;
  logic [Slots-1:0][31:0]           value3_q;
  logic [Slots-1:0][31:0]           value2;
  logic                             end1_q, end2_q, end3_q;

  for (genvar s = 0; s < Slots; s++) begin : gen_slot
    mmfree_round_saturate u_round (
      .value_i({{8{product2_q[s][55]}}, product2_q[s]}),
      .shift_i(scale_q.exponent),
      .value_o(value2[s])
    );
  end

  always_ff @(posedge clk_i) begin
    for (int unsigned s = 0; s < Slots; s++) begin
      sum1_q[s]  <= 32'(slot_q) + s < 5 ? group[3'(32'(slot_q) + s)] : '0;
      used1_q[s] <= 32'(slot_q) + s < 32'(group_rows) && 32'(row_q) + 32'(slot_q) + s < 32'(rows_q);
      product2_q[s] <= 56'(signed'(sum1_q[s])) * signed'({25'b0, scale_q.mantissa});
    end
    first1_q <= row_q + 17'(slot_q);
    used2_q  <= used1_q;
    first2_q <= first1_q;
    value3_q <= value2;
    used3_q  <= used2_q;
    first3_q <= first2_q;
  end

  always_ff @(posedge clk_i or negedge rst_ni) begin
    if (!rst_ni) begin
      busy_q   <= 1'b0;
      is_t5_q  <= 1'b0;
      rows_q   <= '0;
      word_q   <= '0;
      scale_q  <= '0;
      core_q   <= '0;
      row_q    <= '0;
      slot_q   <= '0;
      valid1_q <= 1'b0;
      valid2_q <= 1'b0;
      valid3_q <= 1'b0;
      end1_q   <= 1'b0;
      end2_q   <= 1'b0;
      end3_q   <= 1'b0;
    end else begin
      valid1_q <= take;
      valid2_q <= valid1_q;
      valid3_q <= valid2_q;
      end1_q   <= take && last_slot && last_core && last_group;
      end2_q   <= end1_q;
      end3_q   <= end2_q;
      if (cmd_valid_i && cmd_ready_o) begin
        busy_q  <= 1'b1;
        is_t5_q <= cmd_is_t5_i;
        rows_q  <= cmd_rows_i;
        word_q  <= cmd_word_i;
        scale_q <= cmd_scale_i;
        core_q  <= '0;
        row_q   <= '0;
        slot_q  <= '0;
      end else if (take) begin
        slot_q <= last_slot ? '0 : slot_q + 3'(Slots);
        if (last_slot) begin
          core_q <= last_core ? '0 : core_q + 1'b1;
          row_q  <= row_q + 17'(group_rows);
          if (last_core && last_group) busy_q <= 1'b0;
        end
      end
    end
  end

  assign done_o = end3_q;

  // Slot s holds element first + s, which is in lane (first + s) modulo RowLanes.
  always_comb begin
    we_o    = '0;
    waddr_o = '0;
    wdata_o = '0;
    for (int unsigned lane = 0; lane < RowLanes; lane++) begin
      for (int unsigned s = 0; s < Slots; s++) begin
        automatic logic [16:0] element = first3_q + 17'(s);
        if (RowLanes == 1 || LaneWidth'(element) == LaneWidth'(lane)) begin
          we_o[lane]    = valid3_q && used3_q[s];
          waddr_o[lane] = word_q + AddrWidth'(element >> LaneShift);
          wdata_o[lane] = value3_q[s];
        end
      end
    end
  end

endmodule
