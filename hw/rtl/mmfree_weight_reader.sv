// Reads a stream of packed weights through an AXI4 read port, ahead of those who use it.
//
// A burst is requested as soon as the FIFO has room for all of it, so the memory never waits for
// `rready` and the stream runs on while the core does something else. Bursts are aligned to their
// size and never cross a 4096-byte page.
module mmfree_weight_reader #(
  parameter int unsigned WeightBytes = 8,
  parameter int unsigned FifoBeats   = 32,
  parameter int unsigned BurstBeats  = 8,
  parameter int unsigned AddrWidth   = 40
) (
  input  logic                     clk_i,
  input  logic                     rst_ni,

  // Command: a whole stream
  input  logic                     cmd_valid_i,
  output logic                     cmd_ready_o,
  input  logic [AddrWidth-1:0]     cmd_addr_i,
  input  logic [31:0]              cmd_beats_i,

  // AXI4 read
  output logic                     arvalid_o,
  input  logic                     arready_i,
  output logic [AddrWidth-1:0]     araddr_o,
  output logic [7:0]               arlen_o,
  input  logic                     rvalid_i,
  output logic                     rready_o,
  input  logic [WeightBytes*8-1:0] rdata_i,

  // Weights
  output logic                     valid_o,
  input  logic                     ready_i,
  output logic [WeightBytes*8-1:0] data_o,

  // All that was asked for has come, and the FIFO has no room for the next burst: the memory waits
  // for the arithmetic
  output logic                     full_o
);

  localparam int unsigned CountWidth = $clog2(FifoBeats) + 2;

  logic [31:0]           left_q;
  logic [AddrWidth-1:0]  addr_q;
  logic [CountWidth-1:0] reserved_q;  // beats that are in the FIFO or have a place in it
  logic [CountWidth-1:0] pending_q;   // beats that were asked for and have not come
  logic [CountWidth-1:0] burst;
  logic                  room, request, pop;

  assign cmd_ready_o = left_q == '0;
  assign burst       = left_q < 32'(BurstBeats) ? CountWidth'(left_q) : CountWidth'(BurstBeats);
  assign room        = reserved_q + burst <= CountWidth'(FifoBeats);
  assign arvalid_o   = left_q != '0 && room;
  assign araddr_o    = addr_q;
  assign arlen_o     = 8'(burst - 1'b1);
  assign request     = arvalid_o && arready_i;
  assign pop         = valid_o && ready_i;
  assign full_o      = left_q != '0 && !room && pending_q == '0;

  always_ff @(posedge clk_i or negedge rst_ni) begin
    if (!rst_ni) begin
      left_q     <= '0;
      addr_q     <= '0;
      reserved_q <= '0;
      pending_q  <= '0;
    end else begin
      reserved_q <= reserved_q + (request ? burst : '0) - CountWidth'(pop);
      pending_q  <= pending_q + (request ? burst : '0) - CountWidth'(rvalid_i && rready_o);
      if (cmd_valid_i && cmd_ready_o) begin
        left_q <= cmd_beats_i;
        addr_q <= cmd_addr_i;
      end else if (request) begin
        left_q <= left_q - 32'(burst);
        addr_q <= addr_q + AddrWidth'(BurstBeats * WeightBytes);
      end
    end
  end

  mmfree_fifo #(
    .Width(WeightBytes * 8),
    .Depth(FifoBeats)
  ) u_fifo (
    .clk_i,
    .rst_ni,
    .valid_i(rvalid_i),
    .ready_o(rready_o),
    .data_i (rdata_i),
    .valid_o,
    .ready_i,
    .data_o
  );

`ifdef MMFREE_ASSERTIONS
  // The reservation keeps the memory from ever waiting.
  assert property (@(posedge clk_i) disable iff (!rst_ni) rvalid_i |-> rready_o);
  assert property (@(posedge clk_i) disable iff (!rst_ni)
                   arvalid_o && !arready_i |=> arvalid_o && $stable(araddr_o) && $stable(arlen_o));
`endif

endmodule
