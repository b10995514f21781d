// Ternary matrix-vector product of one core: adds and subtracts 8-bit activations, no multiplier.
//
// A beat holds a byte for each of WeightBytes columns, a byte the trits of five (t5) or four (t2)
// rows. So each beat meets one word of activations and adds to the sums of a group of rows; after `beats`
// beats the group's sums are handed over. Groups of this core are Cores * rows apart.
module mmfree_ternary_unit #(
  parameter int unsigned WeightBytes     = 8,
  parameter int unsigned RowLanes        = 2,
  parameter int unsigned ActivationBytes = 512,
  parameter int unsigned Cores           = 1,
  localparam int unsigned AccWidth       = 24,
  localparam int unsigned ActAddrWidth   = $clog2(ActivationBytes / RowLanes)
) (
  input  logic                              clk_i,
  input  logic                              rst_ni,

  // Command: a matrix of n rows
  input  logic                              cmd_valid_i,
  output logic                              cmd_ready_o,
  input  logic                              cmd_is_t5_i,
  input  logic [15:0]                       cmd_rows_i,
  input  logic [15:0]                       cmd_cols_i,

  // Activations, written in words of the row-wise unit
  input  logic                              act_we_i,
  input  logic [ActAddrWidth-1:0]           act_addr_i,
  input  logic [RowLanes-1:0][7:0]          act_data_i,

  // Weights
  input  logic                              weight_valid_i,
  output logic                              weight_ready_o,
  input  logic [WeightBytes-1:0][7:0]       weight_data_i,

  // Sums of a group of rows
  output logic                              sum_valid_o,
  input  logic                              sum_ready_i,
  output logic [4:0][AccWidth-1:0]          sum_data_o,

  // Waits for weights
  output logic                              starved_o
);

  localparam int unsigned Words      = ActivationBytes / WeightBytes;
  localparam int unsigned WordWidth  = $clog2(Words);
  localparam int unsigned ByteWidth  = $clog2(WeightBytes);
  localparam int unsigned Levels     = $clog2(WeightBytes);
  localparam int unsigned Parts      = WeightBytes / RowLanes;
  localparam int unsigned TreeWidth  = 8 + Levels;
  // From the beat to the sum: read of the activation, selection, tree.
  localparam int unsigned Latency    = 2 + Levels;

  logic                 busy_q, is_t5_q;
  logic [15:0]          rows_q;
  logic [16:0]          row_q;
  logic [WordWidth:0]   beat_q, beats_q;
  logic                 en, take, first_beat, last_beat, last_group;
  logic [16:0]          next_row;

  assign cmd_ready_o    = !busy_q;
  assign weight_ready_o = busy_q && en;
  assign take           = weight_valid_i && weight_ready_o;
  assign starved_o      = busy_q && en && !weight_valid_i;
  assign first_beat     = beat_q == '0;
  assign last_beat      = beat_q + 1'b1 == beats_q;
  assign next_row       = row_q + (is_t5_q ? 17'(5 * Cores) : 17'(4 * Cores));
  assign last_group     = next_row >= {1'b0, rows_q};

  always_ff @(posedge clk_i or negedge rst_ni) begin
    if (!rst_ni) begin
      busy_q  <= 1'b0;
      is_t5_q <= 1'b0;
      rows_q  <= '0;
      row_q   <= '0;
      beat_q  <= '0;
      beats_q <= '0;
    end else if (cmd_valid_i && cmd_ready_o) begin
      busy_q  <= 1'b1;
      is_t5_q <= cmd_is_t5_i;
      rows_q  <= cmd_rows_i;
      row_q   <= '0;
      beat_q  <= '0;
      beats_q <= (WordWidth + 1)'((17'(cmd_cols_i) + 17'(WeightBytes - 1)) >> ByteWidth);
    end else if (take) begin
      beat_q <= last_beat ? '0 : beat_q + 1'b1;
      if (last_beat) begin
        row_q <= next_row;
        if (last_group) busy_q <= 1'b0;
      end
    end
  end

  // Activation memory: a word for each beat, written in parts.
  logic [WeightBytes-1:0][7:0] act_q, weight_q;

  for (genvar part = 0; part < Parts; part++) begin : gen_part
    logic [RowLanes*8-1:0] mem [Words];
    logic                  we;
    if (Parts == 1) begin : gen_whole
      assign we = act_we_i;
    end else begin : gen_part_select
      assign we = act_we_i && act_addr_i[$clog2(Parts)-1:0] == $clog2(Parts)'(part);
    end
    always_ff @(posedge clk_i) begin
      if (we) mem[act_addr_i[ActAddrWidth-1-:WordWidth]] <= act_data_i;
      if (en) act_q[part*RowLanes+:RowLanes] <= mem[beat_q[WordWidth-1:0]];
    end
  end

  always_ff @(posedge clk_i) begin
    if (en) weight_q <= weight_data_i;
  end

  // Each activation added, subtracted or left out, for five rows.
  logic [4:0][WeightBytes-1:0][7:0] terms_q;
  logic [4:0][TreeWidth-1:0]        sums;

  for (genvar k = 0; k < WeightBytes; k++) begin : gen_column
    logic [4:0][1:0] trits;
    mmfree_trit_decoder u_decoder (
      .is_t5_i(is_t5_q),
      .byte_i (weight_q[k]),
      .trits_o(trits)
    );
    always_ff @(posedge clk_i) begin
      if (en) begin
        for (int unsigned r = 0; r < 5; r++) begin
          // {is negative, is not zero}
          terms_q[r][k] <= trits[r][0] ? (trits[r][1] ? -act_q[k] : act_q[k]) : 8'd0;
        end
      end
    end
  end

  for (genvar r = 0; r < 5; r++) begin : gen_row
    logic signed [TreeWidth-1:0] tree_sum;
    mmfree_adder_tree #(
      .Inputs(WeightBytes),
      .Width (8)
    ) u_tree (
      .clk_i,
      .en_i   (en),
      .terms_i(terms_q[r]),
      .sum_o  (tree_sum)
    );
    assign sums[r] = tree_sum;
  end

  // What each beat in flight is: {is valid, begins a group, ends a group}.
  logic [Latency-1:0][2:0]  flags_q;
  logic                     acc_valid, acc_first, acc_last;
  logic [4:0][AccWidth-1:0] acc_q, acc_d;

  assign {acc_valid, acc_first, acc_last} = flags_q[Latency-1];
  // Everything stands still while finished sums wait and more are about to come.
  assign en = !(acc_valid && acc_last && sum_valid_o && !sum_ready_i);

  always_comb begin
    for (int unsigned r = 0; r < 5; r++) begin
      acc_d[r] = (acc_first ? '0 : acc_q[r]) + AccWidth'(signed'(sums[r]));
    end
  end

  always_ff @(posedge clk_i or negedge rst_ni) begin
    if (!rst_ni) begin
      flags_q     <= '0;
      acc_q       <= '0;
      sum_valid_o <= 1'b0;
      sum_data_o  <= '0;
    end else begin
      if (en) begin
        flags_q <= {flags_q[Latency-2:0], {take, first_beat, last_beat}};
        if (acc_valid) acc_q <= acc_d;
      end
      if (en && acc_valid && acc_last) begin
        sum_valid_o <= 1'b1;
        sum_data_o  <= acc_d;
      end else if (sum_ready_i) begin
        sum_valid_o <= 1'b0;
      end
    end
  end

`ifdef MMFREE_ASSERTIONS
  assert property (@(posedge clk_i) disable iff (!rst_ni)
                   sum_valid_o && !sum_ready_i |=> sum_valid_o && $stable(sum_data_o));
`endif

endmodule
