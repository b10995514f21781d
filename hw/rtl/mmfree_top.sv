// The accelerator: control, cores, row-wise unit, vector memory, and their ports to memory.
module mmfree_top
  import mmfree_pkg::*;
#(
  parameter int unsigned Cores           = 2,
  parameter int unsigned WeightBytes     = 8,
  parameter int unsigned RowLanes        = 2,
  parameter int unsigned VectorWords     = 1024,
  parameter int unsigned ActivationBytes = 512,
  parameter int unsigned FifoBeats       = 32,
  parameter int unsigned BurstBeats      = 8,
  parameter int unsigned AddrWidth       = 40,
  localparam int unsigned DataBytes      = 4 * RowLanes,
  localparam int unsigned PcWidth        = $clog2(ProgramLimit)
) (
  input  logic                                clk_i,
  input  logic                                rst_ni,

  // Host
  input  logic                                imem_we_i,
  input  logic [PcWidth-1:0]                  imem_addr_i,
  input  logic [InstructionBits-1:0]          imem_data_i,
  input  logic                                start_i,
  input  logic [31:0]                         token_i,
  output logic                                busy_o,
  output logic                                done_o,
  output logic [31:0]                         token_o,
  output logic                                error_o,

  // Counters, from reset
  output logic [63:0]                         cycles_o,         // while busy
  output logic [63:0]                         starved_cycles_o, // a core waits for weights
  output logic [63:0]                         full_cycles_o,    // a memory waits for room

  // AXI4 ports, without what is constant or not needed: IDs 0, normal accesses; beats are counted, so
  // nobody looks at RLAST
  // Weights: a read port for each core
  output logic [Cores-1:0]                    w_arvalid_o,
  input  logic [Cores-1:0]                    w_arready_i,
  output logic [Cores-1:0][AddrWidth-1:0]     w_araddr_o,
  output logic [Cores-1:0][7:0]               w_arlen_o,
  output logic [Cores-1:0][2:0]               w_arsize_o,
  output logic [Cores-1:0][1:0]               w_arburst_o,
  input  logic [Cores-1:0]                    w_rvalid_i,
  output logic [Cores-1:0]                    w_rready_o,
  input  logic [Cores-1:0][WeightBytes*8-1:0] w_rdata_i,
  input  logic [Cores-1:0][1:0]               w_rresp_i,

  // Data: a read/write port
  output logic                                d_arvalid_o,
  input  logic                                d_arready_i,
  output logic [AddrWidth-1:0]                d_araddr_o,
  output logic [7:0]                          d_arlen_o,
  output logic [2:0]                          d_arsize_o,
  output logic [1:0]                          d_arburst_o,
  input  logic                                d_rvalid_i,
  output logic                                d_rready_o,
  input  logic [DataBytes*8-1:0]              d_rdata_i,
  input  logic [1:0]                          d_rresp_i,
  output logic                                d_awvalid_o,
  input  logic                                d_awready_i,
  output logic [AddrWidth-1:0]                d_awaddr_o,
  output logic [7:0]                          d_awlen_o,
  output logic [2:0]                          d_awsize_o,
  output logic [1:0]                          d_awburst_o,
  output logic                                d_wvalid_o,
  input  logic                                d_wready_i,
  output logic [DataBytes*8-1:0]              d_wdata_o,
  output logic [DataBytes-1:0]                d_wstrb_o,
  output logic                                d_wlast_o,
  input  logic                                d_bvalid_i,
  output logic                                d_bready_o,
  input  logic [1:0]                          d_bresp_i,

  // An instruction is done
  output logic                                retire_o,
  output logic [PcWidth-1:0]                  retire_pc_o
);

  localparam int unsigned VAddrWidth   = $clog2(VectorWords);
  localparam int unsigned ActAddrWidth = $clog2(ActivationBytes / RowLanes);
  localparam int unsigned AccWidth     = 24;
  localparam logic [1:0]  BurstIncr    = 2'b01;

  logic [InstructionBits-1:0] instruction;
  opcode_e                    opcode;
  logic [15:0]                vd, va, vb, vc, n;
  logic [31:0]                imm;
  logic                       is_t5;
  scale_t                     scalar, row_scale;
  logic [AddrWidth-1:0]       addr;
  logic                       row_valid, row_ready, row_done;
  logic                       matvec_valid, matvec_ready, matvec_done;
  logic                       data_valid, data_ready, data_done;
  logic                       stream_valid, stream_ready;
  logic [31:0]                best_index;
  logic                       control_error, response_error_q;

  assign va    = instruction[VaLow+:VaWidth];
  assign vb    = instruction[VbLow+:VbWidth];
  assign vc    = instruction[VcLow+:VcWidth];
  assign n     = instruction[NLow+:NWidth];
  assign imm   = instruction[ImmLow+:ImmWidth];
  assign is_t5 = instruction[SdLow];

  mmfree_control #(
    .RowLanes (RowLanes),
    .AddrWidth(AddrWidth)
  ) u_control (
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
    .error_o       (control_error),
    .instruction_o (instruction),
    .opcode_o      (opcode),
    .vd_o          (vd),
    .scalar_o      (scalar),
    .addr_o        (addr),
    .row_valid_o   (row_valid),
    .row_ready_i   (row_ready),
    .row_done_i    (row_done),
    .row_scale_i   (row_scale),
    .best_index_i  (best_index),
    .matvec_valid_o(matvec_valid),
    .matvec_ready_i(matvec_ready),
    .matvec_done_i (matvec_done),
    .data_valid_o  (data_valid),
    .data_ready_i  (data_ready),
    .data_done_i   (data_done),
    .stream_valid_o(stream_valid),
    .stream_ready_i(stream_ready),
    .retire_o,
    .retire_pc_o
  );

  // Vector memory; one unit at a time uses it.
  logic [2:0][VAddrWidth-1:0]           raddr;
  logic [2:0][RowLanes-1:0][31:0]       rdata;
  logic [RowLanes-1:0]                  we;
  logic [RowLanes-1:0][VAddrWidth-1:0]  waddr;
  logic [RowLanes-1:0][31:0]            wdata;

  logic [2:0][VAddrWidth-1:0]           row_raddr;
  logic [VAddrWidth-1:0]                row_waddr, data_raddr, data_waddr;
  logic                                 row_we, data_we;
  logic [RowLanes-1:0][31:0]            row_wdata, data_wdata, back_wdata;
  logic [RowLanes-1:0]                  back_we;
  logic [RowLanes-1:0][VAddrWidth-1:0]  back_waddr;

  always_comb begin
    raddr = row_raddr;
    if (!data_ready) raddr[0] = data_raddr;
    we    = back_we;
    waddr = back_waddr;
    wdata = back_wdata;
    if (data_we) begin
      we    = '1;
      waddr = {RowLanes{data_waddr}};
      wdata = data_wdata;
    end else if (row_we) begin
      we    = '1;
      waddr = {RowLanes{row_waddr}};
      wdata = row_wdata;
    end
  end

  mmfree_vector_memory #(
    .RowLanes(RowLanes),
    .Words   (VectorWords)
  ) u_vector_memory (
    .clk_i,
    .raddr_i(raddr),
    .rdata_o(rdata),
    .we_i   (we),
    .waddr_i(waddr),
    .wdata_i(wdata)
  );

  // Row-wise unit
  logic                     act_we;
  logic [ActAddrWidth-1:0]  act_addr;
  logic [RowLanes-1:0][7:0] act_data;

  mmfree_row_unit #(
    .RowLanes    (RowLanes),
    .Words       (VectorWords),
    .ActAddrWidth(ActAddrWidth)
  ) u_row (
    .clk_i,
    .rst_ni,
    .cmd_valid_i (row_valid),
    .cmd_ready_o (row_ready),
    .cmd_opcode_i(opcode),
    .cmd_vd_i    (vd),
    .cmd_va_i    (va),
    .cmd_vb_i    (vb),
    .cmd_vc_i    (vc),
    .cmd_n_i     (n),
    .cmd_imm_i   (imm),
    .cmd_factor_i(scalar),
    .done_o      (row_done),
    .scale_o     (row_scale),
    .best_index_o(best_index),
    .raddr_o     (row_raddr),
    .rdata_i     (rdata),
    .we_o        (row_we),
    .waddr_o     (row_waddr),
    .wdata_o     (row_wdata),
    .act_we_o    (act_we),
    .act_addr_o  (act_addr),
    .act_data_o  (act_data)
  );

  // Data port: whole words
  assign d_wstrb_o   = '1;
  assign d_arsize_o  = 3'($clog2(DataBytes));
  assign d_awsize_o  = 3'($clog2(DataBytes));
  assign d_arburst_o = BurstIncr;
  assign d_awburst_o = BurstIncr;

  mmfree_data_port #(
    .RowLanes (RowLanes),
    .Words    (VectorWords),
    .AddrWidth(AddrWidth)
  ) u_data_port (
    .clk_i,
    .rst_ni,
    .cmd_valid_i   (data_valid),
    .cmd_ready_o   (data_ready),
    .cmd_is_store_i(opcode == OpStore),
    .cmd_addr_i    (addr),
    .cmd_word_i    (opcode == OpStore ? va : vd),
    .cmd_n_i       (n),
    .done_o        (data_done),
    .raddr_o       (data_raddr),
    .rdata_i       (rdata[0]),
    .we_o          (data_we),
    .waddr_o       (data_waddr),
    .wdata_o       (data_wdata),
    .arvalid_o     (d_arvalid_o),
    .arready_i     (d_arready_i),
    .araddr_o      (d_araddr_o),
    .arlen_o       (d_arlen_o),
    .rvalid_i      (d_rvalid_i),
    .rready_o      (d_rready_o),
    .rdata_axi_i   (d_rdata_i),
    .awvalid_o     (d_awvalid_o),
    .awready_i     (d_awready_i),
    .awaddr_o      (d_awaddr_o),
    .awlen_o       (d_awlen_o),
    .wvalid_o      (d_wvalid_o),
    .wready_i      (d_wready_i),
    .wdata_axi_o   (d_wdata_o),
    .wlast_o       (d_wlast_o),
    .bvalid_i      (d_bvalid_i),
    .bready_o      (d_bready_o)
  );

  // Cores
  logic [Cores-1:0]                    core_ready, core_stream_ready, starved, full;
  logic [Cores-1:0]                    sum_valid, sum_ready;
  logic [Cores-1:0][4:0][AccWidth-1:0] sum_data;
  logic                                back_ready;

  assign w_arsize_o   = {Cores{3'($clog2(WeightBytes))}};
  assign w_arburst_o  = {Cores{BurstIncr}};
  assign matvec_ready = &core_ready && back_ready;
  assign stream_ready = &core_stream_ready;

  for (genvar core = 0; core < Cores; core++) begin : gen_core
    mmfree_core #(
      .WeightBytes    (WeightBytes),
      .RowLanes       (RowLanes),
      .ActivationBytes(ActivationBytes),
      .FifoBeats      (FifoBeats),
      .BurstBeats     (BurstBeats),
      .Cores          (Cores),
      .AddrWidth      (AddrWidth)
    ) u_core (
      .clk_i,
      .rst_ni,
      .stream_valid_i(stream_valid && stream_ready),
      .stream_ready_o(core_stream_ready[core]),
      .stream_addr_i (addr),
      .stream_beats_i(imm),
      .cmd_valid_i   (matvec_valid && matvec_ready),
      .cmd_ready_o   (core_ready[core]),
      .cmd_is_t5_i   (is_t5),
      .cmd_rows_i    (n),
      .cmd_cols_i    (vc),
      .act_we_i      (act_we),
      .act_addr_i    (act_addr),
      .act_data_i    (act_data),
      .arvalid_o     (w_arvalid_o[core]),
      .arready_i     (w_arready_i[core]),
      .araddr_o      (w_araddr_o[core]),
      .arlen_o       (w_arlen_o[core]),
      .rvalid_i      (w_rvalid_i[core]),
      .rready_o      (w_rready_o[core]),
      .rdata_i       (w_rdata_i[core]),
      .sum_valid_o   (sum_valid[core]),
      .sum_ready_i   (sum_ready[core]),
      .sum_data_o    (sum_data[core]),
      .starved_o     (starved[core]),
      .full_o        (full[core])
    );
  end

  mmfree_writeback #(
    .RowLanes(RowLanes),
    .Words   (VectorWords),
    .Cores   (Cores)
  ) u_writeback (
    .clk_i,
    .rst_ni,
    .cmd_valid_i(matvec_valid && matvec_ready),
    .cmd_ready_o(back_ready),
    .cmd_is_t5_i(is_t5),
    .cmd_rows_i (n),
    .cmd_word_i (VAddrWidth'(vd)),
    .cmd_scale_i(scalar),
    .done_o     (matvec_done),
    .sum_valid_i(sum_valid),
    .sum_ready_o(sum_ready),
    .sum_data_i (sum_data),
    .we_o       (back_we),
    .waddr_o    (back_waddr),
    .wdata_o    (back_wdata)
  );

  // Counters and errors
  assign error_o = control_error || response_error_q;

  logic [Cores-1:0] read_error;
  for (genvar core = 0; core < Cores; core++) begin : gen_error
    assign read_error[core] = w_rvalid_i[core] && w_rresp_i[core] != 2'b00;
  end

  always_ff @(posedge clk_i or negedge rst_ni) begin
    if (!rst_ni) begin
      cycles_o         <= '0;
      starved_cycles_o <= '0;
      full_cycles_o    <= '0;
      response_error_q <= 1'b0;
    end else begin
      if (busy_o) cycles_o <= cycles_o + 1'b1;
      if (|starved) starved_cycles_o <= starved_cycles_o + 1'b1;
      if (|full) full_cycles_o <= full_cycles_o + 1'b1;
      if (|read_error || (d_rvalid_i && d_rresp_i != 2'b00) ||
          (d_bvalid_i && d_bresp_i != 2'b00)) begin
        response_error_q <= 1'b1;
      end
    end
  end

endmodule
