// floor((value + 2^(shift-1)) / 2^shift), the nearest number, halves up, saturated to 32 bits.
// The magnitude of `value` is at most 2^62.
module mmfree_round_saturate (
  input  logic signed [63:0] value_i,
  input  logic        [5:0]  shift_i,
  output logic        [31:0] value_o
);

  logic signed [63:0] half, shifted;

  always_comb begin
    half    = shift_i == '0 ? '0 : 64'sd1 <<< (shift_i - 1'b1);
    shifted = (value_i + half) >>> shift_i;
    value_o = shifted[31:0];
    if (shifted > 64'sh7fff_ffff) value_o = 32'h7fff_ffff;
    if (shifted < -64'sh8000_0000) value_o = 32'h8000_0000;
  end

endmodule
