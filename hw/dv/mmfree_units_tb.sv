// Bench of single modules. The test writes the inputs of one unit for each cycle and reads its outputs
// before the clock's edge; fields are packed as in the concatenations below, the last one lowest.
module mmfree_units_tb
  import mmfree_pkg::*;
  import mmfree_row_pkg::*;
(
  input  logic         clk_i,
  input  logic         rst_ni,
  input  logic [7:0]   unit_i,
  input  logic [511:0] in_i,
  output logic [511:0] out_o
);

  localparam int unsigned Units = 14;

  logic [Units-1:0][511:0] in, out;

`ifdef MMFREE_MUTATIONS
  initial void'($value$plusargs("mutation=%d", mmfree_mutation_pkg::active));
`endif

  always_comb begin
    in = '0;
    in[unit_i[3:0]] = in_i;
  end
  assign out_o = out[unit_i[3:0]];

  // 0: rounding
  logic [31:0] round_value;
  mmfree_round_saturate u_round (
    .value_i(in[0][69:6]),
    .shift_i(in[0][5:0]),
    .value_o(round_value)
  );
  assign out[0] = 512'(round_value);

  // 1: trits of a byte
  logic [4:0][1:0] trits;
  mmfree_trit_decoder u_trits (
    .is_t5_i(in[1][8]),
    .byte_i (in[1][7:0]),
    .trits_o(trits)
  );
  assign out[1] = 512'(trits);

  // 2: adder tree
  logic [10:0] tree_sum;
  mmfree_adder_tree #(
    .Inputs(8),
    .Width (8)
  ) u_tree (
    .clk_i,
    .en_i   (in[2][64]),
    .terms_i(in[2][63:0]),
    .sum_o  (tree_sum)
  );
  assign out[2] = 512'(tree_sum);

  // 3: vector memory
  logic [2:0][3:0]       vm_raddr;
  logic [2:0][1:0][31:0] vm_rdata;
  logic [1:0]            vm_we;
  logic [1:0][3:0]       vm_waddr;
  logic [1:0][31:0]      vm_wdata;
  assign {vm_raddr, vm_we, vm_waddr, vm_wdata} = in[3][85:0];
  mmfree_vector_memory #(
    .RowLanes(2),
    .Words   (16)
  ) u_vectors (
    .clk_i,
    .raddr_i(vm_raddr),
    .rdata_o(vm_rdata),
    .we_i   (vm_we),
    .waddr_i(vm_waddr),
    .wdata_i(vm_wdata)
  );
  assign out[3] = 512'(vm_rdata);

  // 4: FIFO
  logic        fifo_ready, fifo_valid;
  logic [15:0] fifo_data;
  mmfree_fifo #(
    .Width(16),
    .Depth(8)
  ) u_fifo (
    .clk_i,
    .rst_ni,
    .valid_i(in[4][17]),
    .ready_o(fifo_ready),
    .data_i (in[4][15:0]),
    .valid_o(fifo_valid),
    .ready_i(in[4][16]),
    .data_o (fifo_data)
  );
  assign out[4] = 512'({fifo_ready, fifo_valid, fifo_data});

  // 5: lane, with its sigmoid
  logic [3:0]  lane_pass;
  scale_t      lane_scale;
  logic        lane_clear, lane_count;
  logic [31:0] lane_index, lane_a, lane_b, lane_c;
  logic [31:0] lane_result, lane_max, lane_best_value, lane_best_index;
  logic [63:0] lane_sum;
  logic [7:0]  lane_quant;
  assign {lane_pass, lane_scale, lane_clear, lane_count, lane_index, lane_a, lane_b, lane_c} =
      in[5][170:0];
  mmfree_lane u_lane (
    .clk_i,
    .pass_i      (pass_e'(lane_pass)),
    .scale_i     (lane_scale),
    .clear_i     (lane_clear),
    .count_i     (lane_count),
    .index_i     (lane_index),
    .a_i         (lane_a),
    .b_i         (lane_b),
    .c_i         (lane_c),
    .result_o    (lane_result),
    .quant_o     (lane_quant),
    .sum_o       (lane_sum),
    .max_o       (lane_max),
    .best_value_o(lane_best_value),
    .best_index_o(lane_best_index)
  );
  assign out[5] = 512'({lane_result, lane_quant, lane_sum, lane_max, lane_best_value,
                        lane_best_index});

  // 6: root-mean-square unit
  logic        rms_valid, rms_ready, rms_is_quant, rms_done;
  logic [63:0] rms_sum;
  logic [15:0] rms_count;
  logic [31:0] rms_epsilon, rms_maximum;
  scale_t      rms_factor, rms_inverse, rms_dequant;
  assign {rms_valid, rms_is_quant, rms_sum, rms_count, rms_epsilon, rms_maximum, rms_factor} =
      in[6][182:0];
  mmfree_rms_unit u_rms (
    .clk_i,
    .rst_ni,
    .valid_i   (rms_valid),
    .ready_o   (rms_ready),
    .is_quant_i(rms_is_quant),
    .sum_i     (rms_sum),
    .count_i   (rms_count),
    .epsilon_i (rms_epsilon),
    .maximum_i (rms_maximum),
    .factor_i  (rms_factor),
    .done_o    (rms_done),
    .inverse_o (rms_inverse),
    .dequant_o (rms_dequant)
  );
  assign out[6] = 512'({rms_ready, rms_done, rms_inverse, rms_dequant});

  // 7: row-wise unit on a vector memory of its own, which the bench fills and reads while it is idle
  logic                  row_valid, row_ready, row_done, row_fill, row_we, row_act_we;
  logic [6:0]            row_opcode;
  logic [15:0]           row_vd, row_va, row_vb, row_vc, row_n;
  logic [31:0]           row_imm, row_best;
  scale_t                row_factor, row_scale;
  logic [5:0]            row_fill_word, row_waddr;
  logic [1:0][31:0]      row_fill_data, row_wdata;
  logic [2:0][5:0]       row_raddr;
  logic [2:0][1:0][31:0] row_rdata;
  logic [4:0]            row_act_addr;
  logic [1:0][7:0]       row_act_data;
  assign {row_valid, row_opcode, row_vd, row_va, row_vb, row_vc, row_n, row_imm, row_factor,
          row_fill, row_fill_word, row_fill_data} = in[7][227:0];
  mmfree_row_unit #(
    .RowLanes    (2),
    .Words       (64),
    .ActAddrWidth(5)
  ) u_row (
    .clk_i,
    .rst_ni,
    .cmd_valid_i (row_valid),
    .cmd_ready_o (row_ready),
    .cmd_opcode_i(opcode_e'(row_opcode)),
    .cmd_vd_i    (row_vd),
    .cmd_va_i    (row_va),
    .cmd_vb_i    (row_vb),
    .cmd_vc_i    (row_vc),
    .cmd_n_i     (row_n),
    .cmd_imm_i   (row_imm),
    .cmd_factor_i(row_factor),
    .done_o      (row_done),
    .scale_o     (row_scale),
    .best_index_o(row_best),
    .raddr_o     (row_raddr),
    .rdata_i     (row_rdata),
    .we_o        (row_we),
    .waddr_o     (row_waddr),
    .wdata_o     (row_wdata),
    .act_we_o    (row_act_we),
    .act_addr_o  (row_act_addr),
    .act_data_o  (row_act_data)
  );
  mmfree_vector_memory #(
    .RowLanes(2),
    .Words   (64)
  ) u_row_vectors (
    .clk_i,
    .raddr_i(row_ready && !row_valid ? {3{row_fill_word}} : row_raddr),
    .rdata_o(row_rdata),
    .we_i   ({2{row_we || row_fill}}),
    .waddr_i({2{row_fill ? row_fill_word : row_waddr}}),
    .wdata_i(row_fill ? row_fill_data : row_wdata)
  );
  assign out[7] = 512'({row_ready, row_done, row_scale, row_best, row_act_we, row_act_addr,
                        row_act_data, row_rdata[0]});

  // 8: ternary unit, one of two cores
  logic             ter_cmd, ter_ready, ter_t5, ter_act_we, ter_weight_valid, ter_weight_ready;
  logic             ter_sum_valid, ter_sum_ready, ter_starved;
  logic [15:0]      ter_rows, ter_cols;
  logic [4:0]       ter_act_addr;
  logic [1:0][7:0]  ter_act_data;
  logic [63:0]      ter_weights;
  logic [4:0][23:0] ter_sums;
  assign {ter_cmd, ter_t5, ter_rows, ter_cols, ter_act_we, ter_act_addr, ter_act_data,
          ter_weight_valid, ter_weights, ter_sum_ready} = in[8][121:0];
  mmfree_ternary_unit #(
    .WeightBytes    (8),
    .RowLanes       (2),
    .ActivationBytes(64),
    .Cores          (2)
  ) u_ternary (
    .clk_i,
    .rst_ni,
    .cmd_valid_i   (ter_cmd),
    .cmd_ready_o   (ter_ready),
    .cmd_is_t5_i   (ter_t5),
    .cmd_rows_i    (ter_rows),
    .cmd_cols_i    (ter_cols),
    .act_we_i      (ter_act_we),
    .act_addr_i    (ter_act_addr),
    .act_data_i    (ter_act_data),
    .weight_valid_i(ter_weight_valid),
    .weight_ready_o(ter_weight_ready),
    .weight_data_i (ter_weights),
    .sum_valid_o   (ter_sum_valid),
    .sum_ready_i   (ter_sum_ready),
    .sum_data_o    (ter_sums),
    .starved_o     (ter_starved)
  );
  assign out[8] = 512'({ter_ready, ter_weight_ready, ter_sum_valid, ter_sums, ter_starved});

  // 9: weight reader
  logic        rd_cmd, rd_ready, rd_arvalid, rd_arready, rd_rvalid, rd_rready, rd_valid, rd_take;
  logic        rd_full;
  logic [39:0] rd_addr, rd_araddr;
  logic [31:0] rd_beats;
  logic [7:0]  rd_arlen;
  logic [63:0] rd_rdata, rd_data;
  assign {rd_cmd, rd_addr, rd_beats, rd_arready, rd_rvalid, rd_rdata, rd_take} = in[9][139:0];
  mmfree_weight_reader #(
    .WeightBytes(8),
    .FifoBeats  (16),
    .BurstBeats (4)
  ) u_reader (
    .clk_i,
    .rst_ni,
    .cmd_valid_i(rd_cmd),
    .cmd_ready_o(rd_ready),
    .cmd_addr_i (rd_addr),
    .cmd_beats_i(rd_beats),
    .arvalid_o  (rd_arvalid),
    .arready_i  (rd_arready),
    .araddr_o   (rd_araddr),
    .arlen_o    (rd_arlen),
    .rvalid_i   (rd_rvalid),
    .rready_o   (rd_rready),
    .rdata_i    (rd_rdata),
    .valid_o    (rd_valid),
    .ready_i    (rd_take),
    .data_o     (rd_data),
    .full_o     (rd_full)
  );
  assign out[9] = 512'({rd_ready, rd_arvalid, rd_araddr, rd_arlen, rd_rready, rd_valid, rd_data,
                        rd_full});

  // 10: data port
  logic        dp_cmd, dp_ready, dp_store, dp_done, dp_we, dp_arvalid, dp_arready, dp_rvalid;
  logic        dp_rready, dp_awvalid, dp_awready, dp_wvalid, dp_wready, dp_wlast, dp_bvalid;
  logic        dp_bready;
  logic [39:0] dp_addr, dp_araddr, dp_awaddr;
  logic [15:0] dp_word, dp_n;
  logic [7:0]  dp_arlen, dp_awlen;
  logic [63:0] dp_rdata, dp_wdata, dp_axi_rdata, dp_axi_wdata;
  logic [5:0]  dp_raddr, dp_waddr;
  assign {dp_cmd, dp_store, dp_addr, dp_word, dp_n, dp_rdata, dp_arready, dp_rvalid, dp_axi_rdata,
          dp_awready, dp_wready, dp_bvalid} = in[10][206:0];
  mmfree_data_port #(
    .RowLanes(2),
    .Words   (64)
  ) u_data_port (
    .clk_i,
    .rst_ni,
    .cmd_valid_i   (dp_cmd),
    .cmd_ready_o   (dp_ready),
    .cmd_is_store_i(dp_store),
    .cmd_addr_i    (dp_addr),
    .cmd_word_i    (dp_word),
    .cmd_n_i       (dp_n),
    .done_o        (dp_done),
    .raddr_o       (dp_raddr),
    .rdata_i       (dp_rdata),
    .we_o          (dp_we),
    .waddr_o       (dp_waddr),
    .wdata_o       (dp_wdata),
    .arvalid_o     (dp_arvalid),
    .arready_i     (dp_arready),
    .araddr_o      (dp_araddr),
    .arlen_o       (dp_arlen),
    .rvalid_i      (dp_rvalid),
    .rready_o      (dp_rready),
    .rdata_axi_i   (dp_axi_rdata),
    .awvalid_o     (dp_awvalid),
    .awready_i     (dp_awready),
    .awaddr_o      (dp_awaddr),
    .awlen_o       (dp_awlen),
    .wvalid_o      (dp_wvalid),
    .wready_i      (dp_wready),
    .wdata_axi_o   (dp_axi_wdata),
    .wlast_o       (dp_wlast),
    .bvalid_i      (dp_bvalid),
    .bready_o      (dp_bready)
  );
  assign out[10] = 512'({dp_ready, dp_done, dp_raddr, dp_we, dp_waddr, dp_wdata, dp_arvalid,
                         dp_araddr, dp_arlen, dp_rready, dp_awvalid, dp_awaddr, dp_awlen,
                         dp_wvalid, dp_axi_wdata, dp_wlast, dp_bready});

  // 11: writeback of three cores
  logic                  wb_cmd, wb_ready, wb_t5, wb_done;
  logic [15:0]           wb_rows;
  logic [5:0]            wb_word;
  scale_t                wb_scale;
  logic [2:0]            wb_sum_valid, wb_sum_ready;
  logic [4:0][23:0]      wb_sum;
  logic [3:0]            wb_we;
  logic [3:0][5:0]       wb_waddr;
  logic [3:0][31:0]      wb_wdata;
  // The bench changes the sums of the core in turn only, so one bus serves all three.
  assign {wb_cmd, wb_t5, wb_rows, wb_word, wb_scale, wb_sum_valid, wb_sum} = in[11][183:0];
  mmfree_writeback #(
    .RowLanes(4),
    .Words   (64),
    .Cores   (3)
  ) u_writeback (
    .clk_i,
    .rst_ni,
    .cmd_valid_i(wb_cmd),
    .cmd_ready_o(wb_ready),
    .cmd_is_t5_i(wb_t5),
    .cmd_rows_i (wb_rows),
    .cmd_word_i (wb_word),
    .cmd_scale_i(wb_scale),
    .done_o     (wb_done),
    .sum_valid_i(wb_sum_valid),
    .sum_ready_o(wb_sum_ready),
    .sum_data_i ({3{wb_sum}}),
    .we_o       (wb_we),
    .waddr_o    (wb_waddr),
    .wdata_o    (wb_wdata)
  );
  assign out[11] = 512'({wb_ready, wb_done, wb_sum_ready, wb_we, wb_waddr, wb_wdata});

  // 12: core: reader and ternary unit
  logic             co_stream, co_stream_ready, co_cmd, co_ready, co_t5, co_act_we, co_arvalid;
  logic             co_arready, co_rvalid, co_rready, co_sum_valid, co_sum_ready, co_starved;
  logic             co_full;
  logic [39:0]      co_araddr;
  logic [31:0]      co_beats, co_rdata;
  logic [15:0]      co_rows, co_cols;
  logic [3:0]       co_act_addr;
  logic [1:0][7:0]  co_act_data;
  logic [7:0]       co_arlen;
  logic [4:0][23:0] co_sums;
  assign {co_stream, co_beats, co_cmd, co_t5, co_rows, co_cols, co_act_we, co_act_addr,
          co_act_data, co_arready, co_rvalid, co_rdata, co_sum_ready} = in[12][122:0];
  mmfree_core #(
    .WeightBytes    (4),
    .RowLanes       (2),
    .ActivationBytes(32),
    .FifoBeats      (8),
    .BurstBeats     (4),
    .Cores          (1)
  ) u_core (
    .clk_i,
    .rst_ni,
    .stream_valid_i(co_stream),
    .stream_ready_o(co_stream_ready),
    .stream_addr_i ('0),
    .stream_beats_i(co_beats),
    .cmd_valid_i   (co_cmd),
    .cmd_ready_o   (co_ready),
    .cmd_is_t5_i   (co_t5),
    .cmd_rows_i    (co_rows),
    .cmd_cols_i    (co_cols),
    .act_we_i      (co_act_we),
    .act_addr_i    (co_act_addr),
    .act_data_i    (co_act_data),
    .arvalid_o     (co_arvalid),
    .arready_i     (co_arready),
    .araddr_o      (co_araddr),
    .arlen_o       (co_arlen),
    .rvalid_i      (co_rvalid),
    .rready_o      (co_rready),
    .rdata_i       (co_rdata),
    .sum_valid_o   (co_sum_valid),
    .sum_ready_i   (co_sum_ready),
    .sum_data_o    (co_sums),
    .starved_o     (co_starved),
    .full_o        (co_full)
  );
  assign out[12] = 512'({co_stream_ready, co_ready, co_arvalid, co_araddr, co_arlen, co_rready,
                         co_sum_valid, co_sums, co_starved, co_full});

  // 13: control; every unit is ready, done a cycle after it was asked
  logic         ct_we, ct_start, ct_busy, ct_done, ct_error, ct_row, ct_matvec, ct_data, ct_stream;
  logic         ct_retire, ct_ready, ct_done_q;
  logic [7:0]   ct_addr, ct_pc;
  logic [127:0] ct_instruction, ct_issued;
  logic [31:0]  ct_token, ct_token_out, ct_best;
  opcode_e      ct_opcode;
  logic [15:0]  ct_vd;
  scale_t       ct_scale, ct_scalar;
  logic [39:0]  ct_data_addr;
  assign {ct_we, ct_addr, ct_instruction, ct_start, ct_token, ct_ready, ct_scale, ct_best} =
      in[13][239:0];
  always_ff @(posedge clk_i or negedge rst_ni) begin
    if (!rst_ni) ct_done_q <= 1'b0;
    else ct_done_q <= ct_ready && (ct_row || ct_matvec || ct_data);
  end
  mmfree_control #(
    .RowLanes(2)
  ) u_control (
    .clk_i,
    .rst_ni,
    .imem_we_i     (ct_we),
    .imem_addr_i   (ct_addr),
    .imem_data_i   (ct_instruction),
    .start_i       (ct_start),
    .token_i       (ct_token),
    .busy_o        (ct_busy),
    .done_o        (ct_done),
    .token_o       (ct_token_out),
    .error_o       (ct_error),
    .instruction_o (ct_issued),
    .opcode_o      (ct_opcode),
    .vd_o          (ct_vd),
    .scalar_o      (ct_scalar),
    .addr_o        (ct_data_addr),
    .row_valid_o   (ct_row),
    .row_ready_i   (ct_ready),
    .row_done_i    (ct_done_q),
    .row_scale_i   (ct_scale),
    .best_index_i  (ct_best),
    .matvec_valid_o(ct_matvec),
    .matvec_ready_i(ct_ready),
    .matvec_done_i (ct_done_q),
    .data_valid_o  (ct_data),
    .data_ready_i  (ct_ready),
    .data_done_i   (ct_done_q),
    .stream_valid_o(ct_stream),
    .stream_ready_i(ct_ready),
    .retire_o      (ct_retire),
    .retire_pc_o   (ct_pc)
  );
  assign out[13] = 512'({ct_busy, ct_done, ct_token_out, ct_error, ct_opcode, ct_vd, ct_scalar,
                         ct_data_addr, ct_row, ct_matvec, ct_data, ct_stream, ct_retire, ct_pc,
                         ct_issued});

endmodule
