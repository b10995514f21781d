// Root-mean-square unit: scales from reductions, one bit a cycle. 1 / sqrt(sum / count + epsilon) for
// RMSNorm; 127 / maximum and factor * maximum for the quantiser. A mode takes always as long.
module mmfree_rms_unit
  import mmfree_pkg::*;
(
  input  logic        clk_i,
  input  logic        rst_ni,

  // Request
  input  logic        valid_i,
  output logic        ready_o,
  input  logic        is_quant_i,
  input  logic [63:0] sum_i,
  input  logic [15:0] count_i,
  input  logic [31:0] epsilon_i,
  input  logic [31:0] maximum_i,
  input  scale_t      factor_i,

  // Result, valid from `done_o` to the next request
  output logic        done_o,
  output scale_t      inverse_o,
  output scale_t      dequant_o
);

  typedef enum logic [2:0] {
    Idle,
    Mean,
    Epsilon,
    Normalise,
    Root,
    Divide,
    Finish
  } state_e;

  state_e             state_d, state_q;
  logic               is_quant_q;
  logic        [5:0]  step_q;
  logic        [63:0] value_q;     // dividend and quotient; normalised value; radicand
  logic        [33:0] rest_q;      // remainder
  logic        [31:0] root_q;      // root or maximum: the divisor
  logic        [31:0] quotient_q;
  logic        [15:0] count_q;
  logic        [31:0] epsilon_q;
  logic        [6:0]  shift_q;
  scale_t             factor_q;

  // Division of value_q by count_q, a bit a step.
  logic [16:0] mean_rest;
  logic        mean_bit;
  assign mean_rest = {rest_q[15:0], value_q[63]};
  assign mean_bit  = mean_rest >= {1'b0, count_q};

  // Mean and epsilon, saturated.
  logic [64:0] mean_sum;
  assign mean_sum = {1'b0, value_q} + 65'(epsilon_q == '0 ? 32'd1 : epsilon_q);

  // Shift by a power of two if that loses no bit; an even total for the root.
  logic [5:0]  amount;
  logic [63:0] top;
  assign amount = is_quant_q ? 6'd16 >> step_q[2:0] : 6'd32 >> step_q[2:0];
  assign top    = value_q >> (7'd64 - 7'(amount));

  // Root of value_q, a bit a step.
  logic [35:0] root_rest, root_trial;
  logic        root_bit;
  assign root_rest  = {rest_q, value_q[63:62]};
  assign root_trial = {2'b0, root_q, 2'b01};
  assign root_bit   = root_rest >= root_trial;

  // Division by root_q; the dividend's lower half is zero.
  logic [32:0] divide_rest;
  logic        divide_bit;
  assign divide_rest = {rest_q[31:0], 1'b0};
  assign divide_bit  = divide_rest >= {1'b0, root_q};

  logic [30:0]       product;
  logic signed [8:0] dequant_exponent;
  assign product          = 31'((63'(root_q) * 63'(factor_q.mantissa)) >> 32);
  assign dequant_exponent = 9'(factor_q.exponent) + 9'(shift_q) - 9'd32;

  assign ready_o = state_q == Idle;
  assign done_o  = state_q == Finish;

  always_comb begin
    state_d = state_q;
    unique case (state_q)
      Idle:      if (valid_i) state_d = is_quant_i ? Normalise : Mean;
      Mean:      if (step_q == 6'd63) state_d = Epsilon;
      Epsilon:   state_d = Normalise;
      Normalise: if (step_q == 6'd4) state_d = is_quant_q ? Divide : Root;
      Root:      if (step_q == 6'd31) state_d = Divide;
      Divide:    if (step_q == 6'd32) state_d = Finish;
      Finish:    state_d = Idle;
      default:   state_d = Idle;
    endcase
  end

  always_ff @(posedge clk_i or negedge rst_ni) begin
    if (!rst_ni) begin
      state_q    <= Idle;
      is_quant_q <= 1'b0;
      step_q     <= '0;
      value_q    <= '0;
      rest_q     <= '0;
      root_q     <= '0;
      quotient_q <= '0;
      count_q    <= '0;
      epsilon_q  <= '0;
      shift_q    <= '0;
      factor_q   <= '0;
      inverse_o  <= '0;
      dequant_o  <= '0;
    end else begin
      state_q <= state_d;
      step_q  <= state_d == state_q ? step_q + 1'b1 : '0;
      unique case (state_q)
        Idle: begin
          is_quant_q <= is_quant_i;
          factor_q   <= factor_i;
          count_q    <= count_i;
          epsilon_q  <= epsilon_i;
          rest_q     <= '0;
          root_q     <= '0;
          quotient_q <= '0;
          shift_q    <= '0;
          value_q    <= is_quant_i ?
                        {maximum_i < QuantFloor ? QuantFloor : maximum_i, 32'b0} : sum_i;
        end
        Mean: begin
          rest_q  <= mean_bit ? 34'(mean_rest - {1'b0, count_q}) : 34'(mean_rest);
          value_q <= {value_q[62:0], mean_bit};
        end
        Epsilon: begin
          value_q <= mean_sum[64] ? '1 : mean_sum[63:0];
          rest_q  <= '0;
        end
        Normalise: begin
          if (top == '0) begin
            value_q <= value_q << amount;
            shift_q <= shift_q + 7'(amount);
          end
          if (state_d == Divide) begin
            root_q <= top == '0 ? {value_q[62:32], 1'b0} : value_q[63:32];
            rest_q <= 34'd127 << 23;
          end
        end
        Root: begin
          rest_q  <= 34'(root_bit ? root_rest - root_trial : root_rest);
          value_q <= {value_q[61:0], 2'b0};
          root_q  <= {root_q[30:0], root_bit};
          if (state_d == Divide) rest_q <= 34'd1 << 30;
        end
        Divide: begin
          rest_q     <= divide_bit ? 34'(divide_rest - {1'b0, root_q}) : 34'(divide_rest);
          quotient_q <= {quotient_q[30:0], divide_bit};
          if (state_d == Finish) begin
            // One step too many was taken: the quotient of 32 bits is what was there before it.
            inverse_o.mantissa <= quotient_q[31] ? '1 : quotient_q[30:0];
            inverse_o.exponent <= is_quant_q ? 6'(7'd55 - shift_q) : 6'(7'd48 - (shift_q >> 1));
            dequant_o.mantissa <= product;
            dequant_o.exponent <= dequant_exponent < 0  ? '0 :
                                  dequant_exponent > 63 ? '1 : dequant_exponent[5:0];
          end
        end
        default: ;
      endcase
    end
  end

endmodule
