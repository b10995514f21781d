// A memory behind an AXI4 port, for simulation: latency, random stalls, limited bandwidth, errors, a
// hang. Contents are the C++ side's. It checks what it is asked for.
module mmfree_axi_memory #(
  parameter int unsigned Port      = 0,
  parameter int unsigned DataBytes = 8,
  parameter int unsigned AddrWidth = 40
) (
  input  logic                   clk_i,
  input  logic                   rst_ni,

  // Behaviour
  input  logic [31:0]            latency_i,        // cycles from address to first data
  input  logic [31:0]            stall_percent_i,  // chance of a stall on each channel and cycle
  input  logic [31:0]            rate_i,           // data beats in 256 cycles, 256 for no limit
  input  logic                   hang_i,           // nothing is answered
  input  logic                   fail_i,           // answers are errors

  // AXI4 read
  input  logic                   arvalid_i,
  output logic                   arready_o,
  input  logic [AddrWidth-1:0]   araddr_i,
  input  logic [7:0]             arlen_i,
  input  logic [2:0]             arsize_i,
  input  logic [1:0]             arburst_i,
  output logic                   rvalid_o,
  input  logic                   rready_i,
  output logic [DataBytes*8-1:0] rdata_o,
  output logic [1:0]             rresp_o,

  // AXI4 write
  input  logic                   awvalid_i,
  output logic                   awready_o,
  input  logic [AddrWidth-1:0]   awaddr_i,
  input  logic [7:0]             awlen_i,
  input  logic [2:0]             awsize_i,
  input  logic [1:0]             awburst_i,
  input  logic                   wvalid_i,
  output logic                   wready_o,
  input  logic [DataBytes*8-1:0] wdata_i,
  input  logic                   wlast_i,
  output logic                   bvalid_o,
  input  logic                   bready_i,
  output logic [1:0]             bresp_o
);

  import "DPI-C" function void dram_read(input int port, input longint address, input int bytes,
                                         output bit [1023:0] data);
  import "DPI-C" function void dram_write(input longint address, input int bytes,
                                          input bit [1023:0] data);
  import "DPI-C" function int dram_chance(input int percent);

  localparam int unsigned Depth     = 16;
  localparam logic [2:0]  Size      = 3'($clog2(DataBytes));
  localparam logic [1:0]  BurstIncr = 2'b01;

  logic [AddrWidth-1:0] addr_q [Depth];
  logic [7:0]           len_q  [Depth];
  logic [63:0]          time_q [Depth];
  logic [4:0]           wptr_q, rptr_q;
  logic [7:0]           beat_q;
  logic [63:0]          now_q;
  logic [31:0]          credit_q;
  logic [1023:0]        read_data;
  logic [AddrWidth-1:0] write_addr_q;
  logic [7:0]           write_left_q;  // beats after this one
  logic                 writing_q;

  assign rresp_o = fail_i ? 2'b10 : 2'b00;
  assign bresp_o = rresp_o;

  always_ff @(posedge clk_i or negedge rst_ni) begin
    if (!rst_ni) begin
      wptr_q       <= '0;
      rptr_q       <= '0;
      beat_q       <= '0;
      now_q        <= '0;
      credit_q     <= '0;
      arready_o    <= 1'b0;
      rvalid_o     <= 1'b0;
      rdata_o      <= '0;
      awready_o    <= 1'b0;
      wready_o     <= 1'b0;
      bvalid_o     <= 1'b0;
      write_addr_q <= '0;
      write_left_q <= '0;
      writing_q    <= 1'b0;
    end else begin
      now_q <= now_q + 1'b1;

      // Read addresses; two may be on their way when the queue is found full.
      arready_o <= !hang_i && wptr_q - rptr_q < 5'(Depth - 3) && dram_chance(stall_percent_i) == 0;
      if (arvalid_i && arready_o) begin
        addr_q[wptr_q[3:0]] <= araddr_i;
        len_q[wptr_q[3:0]]  <= arlen_i;
        time_q[wptr_q[3:0]] <= now_q + 64'(latency_i);
        wptr_q              <= wptr_q + 1'b1;
      end

      // Read data; bandwidth that is not used is lost.
      if (credit_q < 32'd512) credit_q <= credit_q + rate_i;
      if (rvalid_o && rready_i) rvalid_o <= 1'b0;
      if ((!rvalid_o || rready_i) && wptr_q != rptr_q && !hang_i && now_q >= time_q[rptr_q[3:0]] &&
          credit_q >= 32'd256 && dram_chance(stall_percent_i) == 0) begin
        dram_read(Port, 64'(addr_q[rptr_q[3:0]]) + 64'(beat_q) * 64'(DataBytes), DataBytes,
                  read_data);
        rdata_o  <= read_data[DataBytes*8-1:0];
        rvalid_o <= 1'b1;
        credit_q <= credit_q + rate_i - 32'd256;
        if (beat_q == len_q[rptr_q[3:0]]) begin
          beat_q <= '0;
          rptr_q <= rptr_q + 1'b1;
        end else begin
          beat_q <= beat_q + 1'b1;
        end
      end

      // Write
      awready_o <= !hang_i && !writing_q && !(awvalid_i && awready_o) &&
                   dram_chance(stall_percent_i) == 0;
      wready_o  <= !hang_i && writing_q && !(wvalid_i && wready_o && wlast_i) &&
                   dram_chance(stall_percent_i) == 0;
      if (bvalid_o && bready_i) bvalid_o <= 1'b0;
      if (awvalid_i && awready_o) begin
        write_addr_q <= awaddr_i;
        write_left_q <= awlen_i;
        writing_q    <= 1'b1;
      end
      if (wvalid_i && wready_o) begin
        dram_write(64'(write_addr_q), DataBytes, 1024'(wdata_i));
        write_addr_q <= write_addr_q + AddrWidth'(DataBytes);
        write_left_q <= write_left_q - 1'b1;
        if (wlast_i) begin
          writing_q <= 1'b0;
          bvalid_o  <= 1'b1;
        end
      end
    end
  end

`ifdef MMFREE_ASSERTIONS
  // Bursts count up in whole beats, begin at one, and do not cross 4096 bytes.
  function automatic logic is_whole(logic [AddrWidth-1:0] address, logic [7:0] len);
    return address % AddrWidth'(DataBytes) == '0 &&
           32'(address[11:0]) + (32'(len) + 32'd1) * 32'(DataBytes) <= 32'd4096;
  endfunction

  assert property (@(posedge clk_i) disable iff (!rst_ni)
                   arvalid_i |-> arsize_i == Size && arburst_i == BurstIncr &&
                                 is_whole(araddr_i, arlen_i));
  assert property (@(posedge clk_i) disable iff (!rst_ni)
                   awvalid_i |-> awsize_i == Size && awburst_i == BurstIncr &&
                                 is_whole(awaddr_i, awlen_i));
  // The last beat is the one that the address said.
  assert property (@(posedge clk_i) disable iff (!rst_ni)
                   wvalid_i && wready_o |-> wlast_i == (write_left_q == '0));
`endif

endmodule
