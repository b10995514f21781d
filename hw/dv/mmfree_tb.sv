// Test bench: the accelerator with its memories. C++ drives the clock, holds the memories' contents
// and hears of every write to vector memory and of every instruction that is done.
module mmfree_tb
  import mmfree_pkg::*;
#(
  parameter int unsigned Cores           = 2,
  parameter int unsigned WeightBytes     = 8,
  parameter int unsigned RowLanes        = 2,
  parameter int unsigned VectorWords     = 1024,
  parameter int unsigned ActivationBytes = 512,
  parameter int unsigned FifoBeats       = 32,
  parameter int unsigned BurstBeats      = 8
) (
  input  logic         clk_i,
  input  logic         rst_ni,
  input  logic         imem_we_i,
  input  logic [7:0]   imem_addr_i,
  input  logic [127:0] imem_data_i,
  input  logic         start_i,
  input  logic [31:0]  token_i,
  output logic         busy_o,
  output logic         done_o,
  output logic [31:0]  token_o,
  output logic         error_o,
  output logic [63:0]  cycles_o,
  output logic [63:0]  starved_cycles_o,
  output logic [63:0]  full_cycles_o,
  output logic         retire_o,
  output logic [7:0]   pc_o,

  // Behaviour of the memories
  input  logic [31:0]  latency_i,
  input  logic [31:0]  stall_percent_i,
  input  logic [31:0]  rate_i,
  input  logic         hang_i,
  input  logic         fail_i,
  input  logic         trace_i,
  // Writes the state of every unit to standard error
  input  logic         dump_i
);

  import "DPI-C" function void trace_write(input int element, input int value);
  import "DPI-C" function void trace_scalar(input int index, input int mantissa,
                                            input int exponent);
  import "DPI-C" function void trace_address(input int index, input int value);
  import "DPI-C" function void trace_retire(input int pc);

`ifdef MMFREE_MUTATIONS
  initial void'($value$plusargs("mutation=%d", mmfree_mutation_pkg::active));
`endif

  localparam int unsigned AddrWidth = 40;
  localparam int unsigned DataBytes = 4 * RowLanes;

  logic [Cores-1:0]                    w_arvalid, w_arready, w_rvalid, w_rready;
  logic [Cores-1:0][AddrWidth-1:0]     w_araddr;
  logic [Cores-1:0][7:0]               w_arlen;
  logic [Cores-1:0][2:0]               w_arsize;
  logic [Cores-1:0][1:0]               w_arburst, w_rresp;
  logic [Cores-1:0][WeightBytes*8-1:0] w_rdata;
  logic                                d_arvalid, d_arready, d_rvalid, d_rready;
  logic                                d_awvalid, d_awready, d_wvalid, d_wready, d_wlast;
  logic                                d_bvalid, d_bready;
  logic [AddrWidth-1:0]                d_araddr, d_awaddr;
  logic [7:0]                          d_arlen, d_awlen;
  logic [2:0]                          d_arsize, d_awsize;
  logic [1:0]                          d_arburst, d_awburst, d_rresp, d_bresp;
  logic [DataBytes*8-1:0]              d_rdata, d_wdata;

  mmfree_top #(
    .Cores          (Cores),
    .WeightBytes    (WeightBytes),
    .RowLanes       (RowLanes),
    .VectorWords    (VectorWords),
    .ActivationBytes(ActivationBytes),
    .FifoBeats      (FifoBeats),
    .BurstBeats     (BurstBeats),
    .AddrWidth      (AddrWidth)
  ) dut (
    .clk_i,
    .rst_ni,
    .imem_we_i,
    .imem_addr_i,
    .imem_data_i,
    .start_i,
    .token_i,
    .busy_o,
    .done_o,
    .token_o,
    .error_o,
    .cycles_o,
    .starved_cycles_o,
    .full_cycles_o,
    .w_arvalid_o(w_arvalid),
    .w_arready_i(w_arready),
    .w_araddr_o (w_araddr),
    .w_arlen_o  (w_arlen),
    .w_arsize_o (w_arsize),
    .w_arburst_o(w_arburst),
    .w_rvalid_i (w_rvalid),
    .w_rready_o (w_rready),
    .w_rdata_i  (w_rdata),
    .w_rresp_i  (w_rresp),
    .d_arvalid_o(d_arvalid),
    .d_arready_i(d_arready),
    .d_araddr_o (d_araddr),
    .d_arlen_o  (d_arlen),
    .d_arsize_o (d_arsize),
    .d_arburst_o(d_arburst),
    .d_rvalid_i (d_rvalid),
    .d_rready_o (d_rready),
    .d_rdata_i  (d_rdata),
    .d_rresp_i  (d_rresp),
    .d_awvalid_o(d_awvalid),
    .d_awready_i(d_awready),
    .d_awaddr_o (d_awaddr),
    .d_awlen_o  (d_awlen),
    .d_awsize_o (d_awsize),
    .d_awburst_o(d_awburst),
    .d_wvalid_o (d_wvalid),
    .d_wready_i (d_wready),
    .d_wdata_o  (d_wdata),
    .d_wstrb_o  (),
    .d_wlast_o  (d_wlast),
    .d_bvalid_i (d_bvalid),
    .d_bready_o (d_bready),
    .d_bresp_i  (d_bresp),
    .retire_o,
    .retire_pc_o(pc_o)
  );

  for (genvar core = 0; core < Cores; core++) begin : gen_memory
    mmfree_axi_memory #(
      .Port     (core),
      .DataBytes(WeightBytes),
      .AddrWidth(AddrWidth)
    ) u_memory (
      .clk_i,
      .rst_ni,
      .latency_i,
      .stall_percent_i,
      .rate_i,
      .hang_i,
      .fail_i,
      .arvalid_i(w_arvalid[core]),
      .arready_o(w_arready[core]),
      .araddr_i (w_araddr[core]),
      .arlen_i  (w_arlen[core]),
      .arsize_i (w_arsize[core]),
      .arburst_i(w_arburst[core]),
      .rvalid_o (w_rvalid[core]),
      .rready_i (w_rready[core]),
      .rdata_o  (w_rdata[core]),
      .rresp_o  (w_rresp[core]),
      .awvalid_i(1'b0),
      .awready_o(),
      .awaddr_i ('0),
      .awlen_i  ('0),
      .awsize_i ('0),
      .awburst_i('0),
      .wvalid_i (1'b0),
      .wready_o (),
      .wdata_i  ('0),
      .wlast_i  (1'b0),
      .bvalid_o (),
      .bready_i (1'b0),
      .bresp_o  ()
    );
  end

  mmfree_axi_memory #(
    .Port     (Cores),
    .DataBytes(DataBytes),
    .AddrWidth(AddrWidth)
  ) u_data_memory (
    .clk_i,
    .rst_ni,
    .latency_i,
    .stall_percent_i,
    .rate_i   (32'd256),
    .hang_i,
    .fail_i,
    .arvalid_i(d_arvalid),
    .arready_o(d_arready),
    .araddr_i (d_araddr),
    .arlen_i  (d_arlen),
    .arsize_i (d_arsize),
    .arburst_i(d_arburst),
    .rvalid_o (d_rvalid),
    .rready_i (d_rready),
    .rdata_o  (d_rdata),
    .rresp_o  (d_rresp),
    .awvalid_i(d_awvalid),
    .awready_o(d_awready),
    .awaddr_i (d_awaddr),
    .awlen_i  (d_awlen),
    .awsize_i (d_awsize),
    .awburst_i(d_awburst),
    .wvalid_i (d_wvalid),
    .wready_o (d_wready),
    .wdata_i  (d_wdata),
    .wlast_i  (d_wlast),
    .bvalid_o (d_bvalid),
    .bready_i (d_bready),
    .bresp_o  (d_bresp)
  );

  // State dump: what each unit is doing and what the memories owe it.
  localparam int StandardError = 32'h8000_0002;

  always_ff @(posedge clk_i) begin
    if (dump_i) begin
      $fdisplay(StandardError, "counters: %0d cycles, %0d starved, %0d with a full FIFO", cycles_o,
                starved_cycles_o, full_cycles_o);
      $fdisplay(StandardError, "control: %s, pc %0d, %s (%032h), token %0d, offset %0d, %0d loops",
                dut.u_control.state_q.name(), dut.u_control.pc_q, dut.u_control.opcode.name(),
                dut.u_control.instruction_q, dut.u_control.token_q, dut.u_control.offset_q,
                dut.u_control.depth_q);
      for (int unsigned i = 0; i < LoopDepth; i++) begin
        if (32'(dut.u_control.depth_q) > i) begin
          $fdisplay(StandardError, "  loop %0d: body at %0d, %0d more turns", i,
                    dut.u_control.loops_q[i].body_pc, dut.u_control.loops_q[i].left);
        end
      end
      for (int unsigned i = 0; i < AddressRegisters; i++) begin
        $fdisplay(StandardError, "  a%0d = %0d", i, dut.u_control.addresses_q[i]);
      end
      $fdisplay(StandardError, "row-wise unit: %s, %0d of %0d words, %s",
                dut.u_row.state_q.name(), dut.u_row.finished_q, dut.u_row.words,
                dut.u_row.pass_q.name());
      $fdisplay(StandardError, "data port: %s, %0d words left, %0d not asked for, address %0h",
                dut.u_data_port.state_q.name(), dut.u_data_port.left_q,
                dut.u_data_port.request_q, dut.u_data_port.addr_q);
      $fdisplay(StandardError,
                "  AXI: arvalid %0d arready %0d rvalid %0d rready %0d awvalid %0d %s", d_arvalid,
                d_arready, d_rvalid, d_rready, d_awvalid,
                $sformatf("awready %0d wvalid %0d wready %0d bvalid %0d bready %0d", d_awready,
                          d_wvalid, d_wready, d_bvalid, d_bready));
      $fdisplay(StandardError, "writeback: %s, %0d rows, at row %0d, core %0d in turn",
                dut.u_writeback.busy_q ? "busy" : "idle", dut.u_writeback.rows_q,
                dut.u_writeback.row_q, dut.u_writeback.core_q);
    end
  end

  for (genvar core = 0; core < Cores; core++) begin : gen_dump
    always_ff @(posedge clk_i) begin
      if (dump_i) begin
        automatic int unsigned held =
            32'(dut.gen_core[core].u_core.u_reader.u_fifo.wptr_q -
                dut.gen_core[core].u_core.u_reader.u_fifo.rptr_q) +
            32'(dut.gen_core[core].u_core.u_reader.u_fifo.valid_o);
        $fdisplay(StandardError,
                  "core %0d: ternary unit %s, row %0d of %0d, beat %0d of %0d%s", core,
                  dut.gen_core[core].u_core.u_ternary.busy_q ? "busy" : "idle",
                  dut.gen_core[core].u_core.u_ternary.row_q,
                  dut.gen_core[core].u_core.u_ternary.rows_q,
                  dut.gen_core[core].u_core.u_ternary.beat_q,
                  dut.gen_core[core].u_core.u_ternary.beats_q,
                  dut.gen_core[core].u_core.u_ternary.sum_valid_o ? ", sums wait" : "");
        $fdisplay(StandardError,
                  "  reader: %0d beats not asked for, next address %0h, FIFO %0d of %0d",
                  dut.gen_core[core].u_core.u_reader.left_q,
                  dut.gen_core[core].u_core.u_reader.addr_q, held, FifoBeats);
        $fdisplay(StandardError,
                  "  AXI: arvalid %0d arready %0d rvalid %0d rready %0d, pending %0d",
                  w_arvalid[core], w_arready[core], w_rvalid[core], w_rready[core],
                  dut.gen_core[core].u_core.u_reader.pending_q);
      end
    end
  end

  always_ff @(posedge clk_i) begin
    if (rst_ni && trace_i) begin
      for (int unsigned lane = 0; lane < RowLanes; lane++) begin
        if (dut.u_vector_memory.we_i[lane]) begin
          trace_write(int'(dut.u_vector_memory.waddr_i[lane]) * RowLanes + lane,
                      dut.u_vector_memory.wdata_i[lane]);
        end
      end
      if (retire_o) begin
        for (int unsigned i = 0; i < ScalarRegisters; i++) begin
          trace_scalar(i, int'(dut.u_control.scalars_q[i].mantissa),
                       int'(dut.u_control.scalars_q[i].exponent));
        end
        for (int unsigned i = 0; i < AddressRegisters; i++) begin
          trace_address(i, dut.u_control.addresses_q[i]);
        end
        trace_retire(int'(pc_o));
      end
    end
  end

endmodule
