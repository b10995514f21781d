// A core: weight reader and ternary unit. Cores share the rows of a matrix.
module mmfree_core #(
  parameter int unsigned WeightBytes     = 8,
  parameter int unsigned RowLanes        = 2,
  parameter int unsigned ActivationBytes = 512,
  parameter int unsigned FifoBeats       = 32,
  parameter int unsigned BurstBeats      = 8,
  parameter int unsigned Cores           = 1,
  parameter int unsigned AddrWidth       = 40,
  localparam int unsigned AccWidth       = 24,
  localparam int unsigned ActAddrWidth   = $clog2(ActivationBytes / RowLanes)
) (
  input  logic                     clk_i,
  input  logic                     rst_ni,

  // Command: stream
  input  logic                     stream_valid_i,
  output logic                     stream_ready_o,
  input  logic [AddrWidth-1:0]     stream_addr_i,
  input  logic [31:0]              stream_beats_i,

  // Command: product
  input  logic                     cmd_valid_i,
  output logic                     cmd_ready_o,
  input  logic                     cmd_is_t5_i,
  input  logic [15:0]              cmd_rows_i,
  input  logic [15:0]              cmd_cols_i,

  // Activations
  input  logic                     act_we_i,
  input  logic [ActAddrWidth-1:0]  act_addr_i,
  input  logic [RowLanes-1:0][7:0] act_data_i,

  // AXI4 read
  output logic                     arvalid_o,
  input  logic                     arready_i,
  output logic [AddrWidth-1:0]     araddr_o,
  output logic [7:0]               arlen_o,
  input  logic                     rvalid_i,
  output logic                     rready_o,
  input  logic [WeightBytes*8-1:0] rdata_i,

  // Sums
  output logic                     sum_valid_o,
  input  logic                     sum_ready_i,
  output logic [4:0][AccWidth-1:0] sum_data_o,

  // Events to count
  output logic                     starved_o,
  output logic                     full_o
);

  logic                        weight_valid, weight_ready;
  logic [WeightBytes-1:0][7:0] weight_data;

  mmfree_weight_reader #(
    .WeightBytes(WeightBytes),
    .FifoBeats  (FifoBeats),
    .BurstBeats (BurstBeats),
    .AddrWidth  (AddrWidth)
  ) u_reader (
    .clk_i,
    .rst_ni,
    .cmd_valid_i(stream_valid_i),
    .cmd_ready_o(stream_ready_o),
    .cmd_addr_i (stream_addr_i),
    .cmd_beats_i(stream_beats_i),
    .arvalid_o,
    .arready_i,
    .araddr_o,
    .arlen_o,
    .rvalid_i,
    .rready_o,
    .rdata_i,
    .valid_o    (weight_valid),
    .ready_i    (weight_ready),
    .data_o     (weight_data),
    .full_o
  );

  mmfree_ternary_unit #(
    .WeightBytes    (WeightBytes),
    .RowLanes       (RowLanes),
    .ActivationBytes(ActivationBytes),
    .Cores          (Cores)
  ) u_ternary (
    .clk_i,
    .rst_ni,
    .cmd_valid_i,
    .cmd_ready_o,
    .cmd_is_t5_i,
    .cmd_rows_i,
    .cmd_cols_i,
    .act_we_i,
    .act_addr_i,
    .act_data_i,
    .weight_valid_i(weight_valid),
    .weight_ready_o(weight_ready),
    .weight_data_i (weight_data),
    .sum_valid_o,
    .sum_ready_i,
    .sum_data_o,
    .starved_o
  );

endmodule
