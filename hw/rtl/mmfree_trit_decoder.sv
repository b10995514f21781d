// A byte of packed weights to the trits of five rows: {is negative, is not zero} each.
// Packing t5: five trits, base 3. Packing t2: four trits of two bits, t + 1; the fifth is zero.
module mmfree_trit_decoder
  import mmfree_pkg::*;
(
  input  logic            is_t5_i,
  input  logic [7:0]      byte_i,
  output logic [4:0][1:0] trits_o
);

  always_comb begin
    trits_o = '0;
    if (is_t5_i) begin
      trits_o = TritTable5[byte_i];
    end else begin
      for (int unsigned i = 0; i < 4; i++) begin
        trits_o[i] = {byte_i[2*i+:2] == 2'd0, byte_i[2*i+:2] == 2'd0 || byte_i[2*i+:2] == 2'd2};
      end
    end
  end

endmodule
