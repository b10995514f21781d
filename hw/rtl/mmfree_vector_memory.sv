// Vector memory: words of RowLanes elements, three read ports, one write port with an address and
// an enable for each lane. Reads take one cycle; a read of a word that is written sees the old value.
module mmfree_vector_memory #(
  parameter int unsigned RowLanes = 2,
  parameter int unsigned Words    = 1024,
  localparam int unsigned AddrWidth = $clog2(Words)
) (
  input  logic                               clk_i,

  // Read
  input  logic [2:0][AddrWidth-1:0]          raddr_i,
  output logic [2:0][RowLanes-1:0][31:0]     rdata_o,

  // Write
  input  logic [RowLanes-1:0]                we_i,
  input  logic [RowLanes-1:0][AddrWidth-1:0] waddr_i,
  input  logic [RowLanes-1:0][31:0]          wdata_i
);

  for (genvar lane = 0; lane < RowLanes; lane++) begin : gen_lane
    logic [31:0] mem [Words];
    always_ff @(posedge clk_i) begin
      if (we_i[lane]) mem[waddr_i[lane]] <= wdata_i[lane];
      for (int unsigned port = 0; port < 3; port++) begin
        rdata_o[port][lane] <= mem[raddr_i[port]];
      end
    end
  end

endmodule
