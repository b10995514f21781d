// FIFO with ready/valid on both sides, in block RAM. An entry is readable two cycles after it was
// written. Does not pass data through combinationally.
module mmfree_fifo #(
  parameter int unsigned Width = 8,
  parameter int unsigned Depth = 4  // a power of two
) (
  input  logic             clk_i,
  input  logic             rst_ni,

  // Input
  input  logic             valid_i,
  output logic             ready_o,
  input  logic [Width-1:0] data_i,

  // Output
  output logic             valid_o,
  input  logic             ready_i,
  output logic [Width-1:0] data_o
);

  localparam int unsigned AddrWidth = $clog2(Depth);

  logic [Width-1:0]   mem [Depth];
  logic [AddrWidth:0] wptr_q, rptr_q;
  logic               stored, full, push, fetch;

  assign stored  = wptr_q != rptr_q;
  assign full    = wptr_q == {~rptr_q[AddrWidth], rptr_q[AddrWidth-1:0]};
  assign ready_o = !full;
  assign push    = valid_i && ready_o;
  // The RAM's output register is the head of the queue: it is refilled when it is empty or taken.
  assign fetch   = stored && (!valid_o || ready_i);

  always_ff @(posedge clk_i) begin
    if (push) mem[wptr_q[AddrWidth-1:0]] <= data_i;
    if (fetch) data_o <= mem[rptr_q[AddrWidth-1:0]];
  end

  always_ff @(posedge clk_i or negedge rst_ni) begin
    if (!rst_ni) begin
      wptr_q  <= '0;
      rptr_q  <= '0;
      valid_o <= 1'b0;
    end else begin
      if (push) wptr_q <= wptr_q + 1'b1;
      if (fetch) rptr_q <= rptr_q + 1'b1;
      valid_o <= fetch || (valid_o && !ready_i);
    end
  end

`ifdef MMFREE_ASSERTIONS
  assert property (@(posedge clk_i) disable iff (!rst_ni) valid_i && !ready_o |=> $stable(data_i));
  assert property (@(posedge clk_i) disable iff (!rst_ni) valid_o && !ready_i |=> $stable(data_o));
`endif

endmodule
