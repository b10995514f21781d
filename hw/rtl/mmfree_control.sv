// Fetches, decodes and issues instructions, one at a time and in order; holds loops and registers.
module mmfree_control
  import mmfree_pkg::*;
#(
  parameter int unsigned RowLanes  = 2,
  parameter int unsigned AddrWidth = 40,
  localparam int unsigned PcWidth  = $clog2(ProgramLimit)
) (
  input  logic                       clk_i,
  input  logic                       rst_ni,

  // Host
  input  logic                       imem_we_i,
  input  logic [PcWidth-1:0]         imem_addr_i,
  input  logic [InstructionBits-1:0] imem_data_i,
  input  logic                       start_i,
  input  logic [31:0]                token_i,
  output logic                       busy_o,
  output logic                       done_o,
  output logic [31:0]                token_o,
  output logic                       error_o,

  // The instruction and its operands
  output logic [InstructionBits-1:0] instruction_o,
  output opcode_e                    opcode_o,
  output logic [15:0]                vd_o,
  output scale_t                     scalar_o,
  output logic [AddrWidth-1:0]       addr_o,

  // Row-wise unit
  output logic                       row_valid_o,
  input  logic                       row_ready_i,
  input  logic                       row_done_i,
  input  scale_t                     row_scale_i,
  input  logic [31:0]                best_index_i,

  // Matrix product: cores and writeback together
  output logic                       matvec_valid_o,
  input  logic                       matvec_ready_i,
  input  logic                       matvec_done_i,

  // Data port
  output logic                       data_valid_o,
  input  logic                       data_ready_i,
  input  logic                       data_done_i,

  // Streams of all cores
  output logic                       stream_valid_o,
  input  logic                       stream_ready_i,

  // An instruction is done
  output logic                       retire_o,
  output logic [PcWidth-1:0]         retire_pc_o
);

  localparam int unsigned DepthWidth = $clog2(LoopDepth + 1);
  localparam int unsigned UnitShift  = $clog2(AddressUnitBytes);
  localparam int unsigned WordShift  = $clog2(4 * RowLanes);

  typedef enum logic [2:0] {
    Idle,
    Fetch,
    Decode,
    Issue,
    Wait,
    Retire
  } state_e;

  typedef struct packed {
    logic [PcWidth-1:0] body_pc;
    logic [31:0]        left;
  } loop_t;

  state_e                                 state_d, state_q;
  logic [InstructionBits-1:0]             imem [ProgramLimit];
  logic [InstructionBits-1:0]             fetched_q, instruction_q;
  logic [PcWidth-1:0]                     pc_q, next_pc_q;
  loop_t [LoopDepth-1:0]                  loops_q;
  logic [DepthWidth-1:0]                  depth_q;
  scale_t [ScalarRegisters-1:0]           scalars_q;
  logic [AddressRegisters-1:0][31:0]      addresses_q;
  logic [15:0]                            offset_q;
  logic [31:0]                            token_q;
  opcode_e                                opcode;
  logic [SdWidth-1:0]                     sd;
  logic [SaWidth-1:0]                     sa;
  logic [NWidth-1:0]                      n;
  logic [ImmWidth-1:0]                    imm;
  logic                                   is_row, is_data;
  logic [31:0]                            unit_addr;
  logic [31:0]                            moved;
  loop_t                                  inner;

  always_ff @(posedge clk_i) begin
    if (imem_we_i) imem[imem_addr_i] <= imem_data_i;
    fetched_q <= imem[pc_q];
  end

  assign opcode = opcode_e'(instruction_q[OpcodeLow+:OpcodeWidth]);
  assign sd     = instruction_q[SdLow+:SdWidth];
  assign sa     = instruction_q[SaLow+:SaWidth];
  assign n      = instruction_q[NLow+:NWidth];
  assign imm    = instruction_q[ImmLow+:ImmWidth];
  assign inner  = loops_q[$clog2(LoopDepth)'(depth_q - 1'b1)];

  assign is_row = opcode inside {OpSetS, OpRmsNorm, OpQuant, OpAdd, OpMul, OpSigmoid, OpSilu,
                                 OpSwiGlu, OpMlgru, OpArgMax, OpClearMax};
  assign is_data = opcode inside {OpLoad, OpStore, OpEmbed};

  // Vectors take whole address units.
  assign moved = ((((32'(n) + 32'(RowLanes - 1)) >> $clog2(RowLanes)) << WordShift) +
                  32'(AddressUnitBytes - 1)) >> UnitShift;

  assign unit_addr = addresses_q[sa[2:0]] + (opcode == OpEmbed ? token_q * imm : 32'd0);

  assign instruction_o  = instruction_q;
  assign opcode_o       = opcode;
  assign vd_o           = instruction_q[VdLow+:VdWidth] +
                          (instruction_q[IndexedLow] ? offset_q : '0);
  assign scalar_o       = scalars_q[sa];
  assign addr_o         = AddrWidth'(unit_addr) << UnitShift;
  assign row_valid_o    = state_q == Issue && is_row;
  assign data_valid_o   = state_q == Issue && is_data;
  assign matvec_valid_o = state_q == Issue && opcode == OpMatVec;
  assign stream_valid_o = state_q == Issue && opcode == OpStream;
  assign busy_o         = state_q != Idle;
  assign token_o        = token_q;
  assign retire_o       = state_q == Retire;
  assign retire_pc_o    = pc_q;
  assign done_o         = state_q == Retire && opcode == OpHalt;

  always_comb begin
    state_d = state_q;
    unique case (state_q)
      Idle:   if (start_i) state_d = Fetch;
      Fetch:  state_d = Decode;
      Decode: state_d = Issue;
      Issue: begin
        unique case (opcode)
          OpStream: if (stream_ready_i) state_d = Retire;
          OpMatVec: if (matvec_ready_i) state_d = Wait;
          default: begin
            if (is_row) begin
              if (row_ready_i) state_d = Wait;
            end else if (is_data) begin
              if (data_ready_i) state_d = Wait;
            end else begin
              state_d = Retire;
            end
          end
        endcase
      end
      Wait:    if (row_done_i || data_done_i || matvec_done_i) state_d = Retire;
      Retire:  state_d = opcode == OpHalt || error_o ? Idle : Fetch;
      default: state_d = Idle;
    endcase
  end

  always_ff @(posedge clk_i or negedge rst_ni) begin
    if (!rst_ni) begin
      state_q       <= Idle;
      instruction_q <= '0;
      pc_q          <= '0;
      next_pc_q     <= '0;
      loops_q       <= '0;
      depth_q       <= '0;
      scalars_q     <= '0;
      addresses_q   <= '0;
      offset_q      <= '0;
      token_q       <= '0;
      error_o       <= 1'b0;
    end else begin
      state_q <= state_d;
      unique case (state_q)
        Idle: begin
          if (start_i) begin
            token_q <= token_i;
            pc_q    <= '0;
            depth_q <= '0;
          end
        end
        Decode: begin
          instruction_q <= fetched_q;
          next_pc_q     <= pc_q + 1'b1;
        end
        Issue: begin
          unique case (opcode)
            OpHalt: token_q <= best_index_i;
            OpLoop: begin
              if (depth_q == DepthWidth'(LoopDepth)) begin
                error_o <= 1'b1;
              end else begin
                loops_q[$clog2(LoopDepth)'(depth_q)] <= '{
                  body_pc: next_pc_q,
                  left: imm == '0 ? '0 : imm - 1'b1
                };
                depth_q <= depth_q + 1'b1;
              end
            end
            OpEnd: begin
              if (depth_q == '0) begin
                error_o <= 1'b1;
              end else if (inner.left == '0) begin
                depth_q <= depth_q - 1'b1;
              end else begin
                loops_q[$clog2(LoopDepth)'(depth_q - 1'b1)].left <= inner.left - 1'b1;
                next_pc_q <= inner.body_pc;
              end
            end
            OpSetA: addresses_q[sd[2:0]] <= imm;
            OpSetO: offset_q <= imm[15:0];
            OpAddO: offset_q <= offset_q + imm[15:0];
            OpStream, OpMatVec: ;
            default: if (!is_row && !is_data) error_o <= 1'b1;
          endcase
        end
        Wait: begin
          if (state_d == Retire) begin
            if (opcode inside {OpQuant, OpSetS}) scalars_q[sd] <= row_scale_i;
            if (opcode inside {OpLoad, OpStore} && sd[0]) begin
              addresses_q[sa[2:0]] <= addresses_q[sa[2:0]] + moved;
            end
          end
        end
        Retire:  pc_q <= next_pc_q;
        default: ;
      endcase
    end
  end

endmodule
