// Row-wise unit: norms, the quantiser, gates, the recurrence and the search for the largest element.
// An instruction is one or two passes over its vectors, a word a cycle, with a scalar step between.
module mmfree_row_unit
  import mmfree_pkg::*;
  import mmfree_row_pkg::*;
#(
  parameter int unsigned RowLanes     = 2,
  parameter int unsigned Words        = 1024,
  parameter int unsigned ActAddrWidth = 8,
  localparam int unsigned AddrWidth   = $clog2(Words)
) (
  input  logic                           clk_i,
  input  logic                           rst_ni,

  // Command
  input  logic                           cmd_valid_i,
  output logic                           cmd_ready_o,
  input  opcode_e                        cmd_opcode_i,
  input  logic [15:0]                    cmd_vd_i,
  input  logic [15:0]                    cmd_va_i,
  input  logic [15:0]                    cmd_vb_i,
  input  logic [15:0]                    cmd_vc_i,
  input  logic [15:0]                    cmd_n_i,
  input  logic [31:0]                    cmd_imm_i,
  input  scale_t                         cmd_factor_i,
  output logic                           done_o,
  output scale_t                         scale_o,

  // Best element so far
  output logic [31:0]                    best_index_o,

  // Vector memory
  output logic [2:0][AddrWidth-1:0]      raddr_o,
  input  logic [2:0][RowLanes-1:0][31:0] rdata_i,
  output logic                           we_o,
  output logic [AddrWidth-1:0]           waddr_o,
  output logic [RowLanes-1:0][31:0]      wdata_o,

  // Activations
  output logic                           act_we_o,
  output logic [ActAddrWidth-1:0]        act_addr_o,
  output logic [RowLanes-1:0][7:0]       act_data_o
);

  // From the issue of a word to its result: the read, and the lane.
  localparam int unsigned Latency   = LaneLatency + 1;
  localparam int unsigned LaneShift = $clog2(RowLanes);
  localparam int unsigned LaneWidth = RowLanes > 1 ? $clog2(RowLanes) : 1;

  typedef enum logic [3:0] {
    Idle,
    Pass,
    Reduce,
    Scalar,
    SetMantissa,
    SetExponent,
    SetLast,
    Done
  } state_e;

  state_e               state_d, state_q;
  opcode_e              opcode_q;
  logic [15:0]          vd_q, va_q, vb_q, vc_q, n_q;
  logic [31:0]          imm_q;
  scale_t               factor_q, scale_q;
  pass_e                pass_q;
  logic [15:0]          words, issued_q, finished_q;
  logic [Latency-1:0]   valid_q;
  logic [LaneWidth-1:0] lane_q;
  logic [63:0]          sum_q;
  logic [31:0]          max_q, best_index_q, next_index_q;
  logic signed [31:0]   best_value_q;
  logic                 issue, clear, writes;

  assign words = 16'((17'(n_q) + 17'(RowLanes - 1)) >> LaneShift);
  assign issue = state_q == Pass && issued_q != words;

  // Addresses of a pass. The forget gate is computed in place, from vb and vc.
  logic [15:0] a_word, b_word, c_word, d_word;
  always_comb begin
    a_word = va_q;
    b_word = vb_q;
    c_word = vd_q;
    d_word = vd_q;
    if (pass_q == PassGate) begin
      a_word = vb_q;
      b_word = vc_q;
      d_word = vb_q;
    end
  end

  // A scale is two elements, which may lie in two words.
  logic [16:0]          set_next;
  logic [LaneWidth-1:0] mantissa_lane, exponent_lane;
  assign set_next      = {1'b0, n_q} + 17'd1;
  assign mantissa_lane = RowLanes > 1 ? LaneWidth'(n_q) : '0;
  assign exponent_lane = RowLanes > 1 ? LaneWidth'(set_next) : '0;

  always_comb begin
    raddr_o[0] = AddrWidth'(a_word + issued_q);
    raddr_o[1] = AddrWidth'(b_word + issued_q);
    raddr_o[2] = AddrWidth'(c_word + issued_q);
    if (state_q == Idle) begin
      raddr_o[0] = AddrWidth'(cmd_va_i + (cmd_n_i >> LaneShift));
    end else if (state_q == SetMantissa) begin
      raddr_o[0] = AddrWidth'(17'(va_q) + (set_next >> LaneShift));
    end
  end

  // Lanes
  logic [RowLanes-1:0][63:0] lane_sum;
  logic [RowLanes-1:0][31:0] lane_max, lane_best_value, lane_best_index, lane_result;
  logic [RowLanes-1:0][7:0]  lane_quant;
  logic [31:0]               read_element_q;  // first element of the word that is read

  assign clear = state_q == Idle;

  for (genvar lane = 0; lane < RowLanes; lane++) begin : gen_lane
    logic [31:0] element;
    assign element = read_element_q + 32'(lane);
    mmfree_lane u_lane (
      .clk_i,
      .pass_i      (pass_q),
      .scale_i     (scale_q),
      .clear_i     (clear),
      .count_i     (valid_q[0] && element < 32'(n_q)),
      .index_i     (next_index_q + element),
      .a_i         (rdata_i[0][lane]),
      .b_i         (rdata_i[1][lane]),
      .c_i         (rdata_i[2][lane]),
      .result_o    (lane_result[lane]),
      .quant_o     (lane_quant[lane]),
      .sum_o       (lane_sum[lane]),
      .max_o       (lane_max[lane]),
      .best_value_o(lane_best_value[lane]),
      .best_index_o(lane_best_index[lane])
    );
    // Elements that fill up the last word are zero activations.
    assign act_data_o[lane] =
        (32'(finished_q) << LaneShift) + 32'(lane) < 32'(n_q) ? lane_quant[lane] : '0;
  end

  assign writes     = !(pass_q inside {PassSquare, PassMax, PassBest, PassQuant});
  assign we_o       = valid_q[Latency-1] && writes;
  assign waddr_o    = AddrWidth'(d_word + finished_q);
  assign wdata_o    = lane_result;
  assign act_we_o   = valid_q[Latency-1] && pass_q == PassQuant;
  assign act_addr_o = ActAddrWidth'(finished_q);

  // Scalar step
  logic   rms_valid_q, unused_rms_ready, rms_done;
  scale_t rms_inverse, rms_dequant;

  mmfree_rms_unit u_rms (
    .clk_i,
    .rst_ni,
    .valid_i   (rms_valid_q),
    .ready_o   (unused_rms_ready),  // one request at a time
    .is_quant_i(opcode_q == OpQuant),
    .sum_i     (sum_q),
    .count_i   (n_q),
    .epsilon_i (imm_q),
    .maximum_i (max_q),
    .factor_i  (factor_q),
    .done_o    (rms_done),
    .inverse_o (rms_inverse),
    .dequant_o (rms_dequant)
  );

  logic last_lane, pass_done;
  assign last_lane = lane_q == LaneWidth'(RowLanes - 1);
  assign pass_done = valid_q[Latency-1] && finished_q + 1'b1 == words;

  always_comb begin
    state_d = state_q;
    unique case (state_q)
      Idle: begin
        if (cmd_valid_i) begin
          unique case (cmd_opcode_i)
            OpSetS:     state_d = SetMantissa;
            OpClearMax: state_d = Done;
            default:    state_d = Pass;
          endcase
        end
      end
      Pass: begin
        if (pass_done) begin
          unique case (pass_q)
            PassSquare, PassMax, PassBest: state_d = Reduce;
            PassGate: ;  // the recurrence's pass follows
            default:  state_d = Done;
          endcase
        end
      end
      Reduce:      if (last_lane) state_d = pass_q == PassBest ? Done : Scalar;
      Scalar:      if (rms_done) state_d = Pass;
      SetMantissa: state_d = SetExponent;
      SetExponent: state_d = SetLast;
      SetLast:     state_d = Done;
      Done:        state_d = Idle;
      default:     state_d = Idle;
    endcase
  end

  always_ff @(posedge clk_i or negedge rst_ni) begin
    if (!rst_ni) begin
      state_q        <= Idle;
      opcode_q       <= OpHalt;
      vd_q           <= '0;
      va_q           <= '0;
      vb_q           <= '0;
      vc_q           <= '0;
      n_q            <= '0;
      imm_q          <= '0;
      factor_q       <= '0;
      scale_q        <= '0;
      pass_q         <= PassAdd;
      issued_q       <= '0;
      finished_q     <= '0;
      valid_q        <= '0;
      lane_q         <= '0;
      sum_q          <= '0;
      max_q          <= '0;
      best_value_q   <= 32'sh8000_0000;
      best_index_q   <= '0;
      next_index_q   <= '0;
      read_element_q <= '0;
      rms_valid_q    <= 1'b0;
      scale_o        <= '0;
    end else begin
      valid_q        <= {valid_q[Latency-2:0], issue};
      read_element_q <= 32'(issued_q) << LaneShift;
      rms_valid_q    <= 1'b0;
      if (issue) issued_q <= issued_q + 1'b1;
      if (valid_q[Latency-1]) finished_q <= finished_q + 1'b1;

      state_q <= state_d;
      unique case (state_q)
        Idle: begin
          if (cmd_valid_i) begin
            opcode_q   <= cmd_opcode_i;
            vd_q       <= cmd_vd_i;
            va_q       <= cmd_va_i;
            vb_q       <= cmd_vb_i;
            vc_q       <= cmd_vc_i;
            n_q        <= cmd_n_i;
            imm_q      <= cmd_imm_i;
            factor_q   <= cmd_factor_i;
            issued_q   <= '0;
            finished_q <= '0;
            lane_q     <= '0;
            sum_q      <= '0;
            max_q      <= '0;
            unique case (cmd_opcode_i)
              OpRmsNorm: pass_q <= PassSquare;
              OpQuant:   pass_q <= PassMax;
              OpArgMax:  pass_q <= PassBest;
              OpMul:     pass_q <= PassMul;
              OpSigmoid: pass_q <= PassSigmoid;
              OpSilu:    pass_q <= PassSilu;
              OpSwiGlu:  pass_q <= PassSwiGlu;
              OpMlgru:   pass_q <= PassGate;
              OpClearMax: begin
                best_value_q <= 32'sh8000_0000;
                best_index_q <= '0;
                next_index_q <= '0;
              end
              default:   pass_q <= PassAdd;
            endcase
          end
        end
        Pass: begin
          if (pass_done) begin
            issued_q   <= '0;
            finished_q <= '0;
            if (pass_q == PassGate) pass_q <= PassRecur;
          end
        end
        Reduce: begin
          lane_q <= lane_q + 1'b1;
          sum_q  <= sum_q + lane_sum[lane_q];
          if (lane_max[lane_q] > max_q) max_q <= lane_max[lane_q];
          if (pass_q == PassBest &&
              (signed'(lane_best_value[lane_q]) > best_value_q ||
               (signed'(lane_best_value[lane_q]) == best_value_q &&
                lane_best_index[lane_q] < best_index_q &&
                lane_best_index[lane_q] >= next_index_q))) begin
            best_value_q <= signed'(lane_best_value[lane_q]);
            best_index_q <= lane_best_index[lane_q];
          end
          if (state_d == Done) next_index_q <= next_index_q + 32'(n_q);
          if (state_d == Scalar) rms_valid_q <= 1'b1;
        end
        Scalar: begin
          if (rms_done) begin
            scale_q <= rms_inverse;
            scale_o <= rms_dequant;
            pass_q  <= opcode_q == OpQuant ? PassQuant : PassNorm;
          end
        end
        SetMantissa: scale_o.mantissa <= rdata_i[0][mantissa_lane][30:0];
        SetExponent: scale_o.exponent <= rdata_i[0][exponent_lane][5:0];
        default: ;
      endcase
    end
  end

  assign cmd_ready_o  = state_q == Idle;
  assign done_o       = state_q == Done;
  assign best_index_o = best_index_q;

`ifdef MMFREE_ASSERTIONS
  assert property (@(posedge clk_i) disable iff (!rst_ni) rms_valid_q |-> unused_rms_ready);
`endif

endmodule
