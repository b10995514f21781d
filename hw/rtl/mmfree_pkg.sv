// Constants that hardware and software share.
// Written by mmfree-accel (crates/accel/src/package.rs): change it there. A test compares.
package mmfree_pkg;
  // Instruction set
  localparam int unsigned IsaVersion = 1;
  localparam int unsigned InstructionBits = 128;
  localparam int unsigned ProgramLimit = 256;
  localparam int unsigned ScalarRegisters = 16;
  localparam int unsigned AddressRegisters = 8;
  localparam int unsigned AddressUnitBytes = 128;
  localparam int unsigned LoopDepth = 4;
  localparam int unsigned VectorLimit = 16383;

  // Fields of an instruction
  localparam int unsigned OpcodeLow = 0;
  localparam int unsigned OpcodeWidth = 7;
  localparam int unsigned IndexedLow = 7;
  localparam int unsigned IndexedWidth = 1;
  localparam int unsigned SdLow = 8;
  localparam int unsigned SdWidth = 4;
  localparam int unsigned SaLow = 12;
  localparam int unsigned SaWidth = 4;
  localparam int unsigned VdLow = 16;
  localparam int unsigned VdWidth = 16;
  localparam int unsigned VaLow = 32;
  localparam int unsigned VaWidth = 16;
  localparam int unsigned VbLow = 48;
  localparam int unsigned VbWidth = 16;
  localparam int unsigned VcLow = 64;
  localparam int unsigned VcWidth = 16;
  localparam int unsigned NLow = 80;
  localparam int unsigned NWidth = 16;
  localparam int unsigned ImmLow = 96;
  localparam int unsigned ImmWidth = 32;

  typedef enum logic [OpcodeWidth-1:0] {
    OpHalt = 7'd0,
    OpLoop = 7'd1,
    OpEnd = 7'd2,
    OpSetA = 7'd3,
    OpSetO = 7'd4,
    OpAddO = 7'd5,
    OpStream = 7'd6,
    OpLoad = 7'd7,
    OpStore = 7'd8,
    OpEmbed = 7'd9,
    OpSetS = 7'd10,
    OpRmsNorm = 7'd11,
    OpQuant = 7'd12,
    OpMatVec = 7'd13,
    OpAdd = 7'd14,
    OpMul = 7'd15,
    OpSigmoid = 7'd16,
    OpSilu = 7'd17,
    OpSwiGlu = 7'd18,
    OpMlgru = 7'd19,
    OpArgMax = 7'd20,
    OpClearMax = 7'd21
  } opcode_e;

  // Arithmetic: docs/numerics.md
  localparam int unsigned FractionBits = 20;
  localparam int unsigned SquareShift = 12;
  localparam int unsigned QuantFloor = 10;
  localparam int unsigned SigmoidSegments = 256;

  // A factor: mantissa * 2^-exponent
  typedef struct packed {
    logic [30:0] mantissa;
    logic [5:0] exponent;
  } scale_t;

  // Sigmoid on [0, 16) in steps of 1/16: value (21 bits) and rise (15 bits) of each segment, Q20.
  localparam logic [SigmoidSegments-1:0][35:0] SigmoidTable = {
    36'h800000000, 36'h800000000, 36'h800000000, 36'h800000000, 36'h800000000, 36'h800000000,
    36'h800000000, 36'h800000000, 36'h800000000, 36'h800000000, 36'h800000000, 36'h800000000,
    36'h800000000, 36'h800000000, 36'h800000000, 36'h800000000, 36'h800000000, 36'h800000000,
    36'h800000000, 36'h800000000, 36'h800000000, 36'h800000000, 36'h800000000, 36'h7ffff8001,
    36'h7ffff8000, 36'h7ffff8000, 36'h7ffff8000, 36'h7ffff8000, 36'h7ffff8000, 36'h7ffff8000,
    36'h7ffff8000, 36'h7ffff8000, 36'h7ffff8000, 36'h7ffff8000, 36'h7ffff8000, 36'h7ffff8000,
    36'h7ffff8000, 36'h7ffff8000, 36'h7ffff8000, 36'h7ffff8000, 36'h7ffff0001, 36'h7ffff0000,
    36'h7ffff0000, 36'h7ffff0000, 36'h7ffff0000, 36'h7ffff0000, 36'h7ffff0000, 36'h7ffff0000,
    36'h7fffe8001, 36'h7fffe8000, 36'h7fffe8000, 36'h7fffe8000, 36'h7fffe8000, 36'h7fffe8000,
    36'h7fffe0001, 36'h7fffe0000, 36'h7fffe0000, 36'h7fffe0000, 36'h7fffd8001, 36'h7fffd8000,
    36'h7fffd8000, 36'h7fffd0001, 36'h7fffd0000, 36'h7fffd0000, 36'h7fffc8001, 36'h7fffc8000,
    36'h7fffc0001, 36'h7fffc0000, 36'h7fffb8001, 36'h7fffb8000, 36'h7fffb0001, 36'h7fffa8001,
    36'h7fffa8000, 36'h7fffa0001, 36'h7fff98001, 36'h7fff90001, 36'h7fff88001, 36'h7fff88000,
    36'h7fff80001, 36'h7fff70002, 36'h7fff68001, 36'h7fff60001, 36'h7fff58001, 36'h7fff50001,
    36'h7fff40002, 36'h7fff38001, 36'h7fff28002, 36'h7fff18002, 36'h7fff08002, 36'h7ffef8002,
    36'h7ffee8002, 36'h7ffed8002, 36'h7ffec8002, 36'h7ffeb0003, 36'h7ffe98003, 36'h7ffe80003,
    36'h7ffe68003, 36'h7ffe50003, 36'h7ffe38003, 36'h7ffe18004, 36'h7ffdf8004, 36'h7ffdd8004,
    36'h7ffdb0005, 36'h7ffd90004, 36'h7ffd60006, 36'h7ffd38005, 36'h7ffd08006, 36'h7ffcd8006,
    36'h7ffca8006, 36'h7ffc70007, 36'h7ffc30008, 36'h7ffbf8007, 36'h7ffbb0009, 36'h7ffb68009,
    36'h7ffb20009, 36'h7ffad000a, 36'h7ffa7800b, 36'h7ffa2000b, 36'h7ff9c000c, 36'h7ff95800d,
    36'h7ff8e800e, 36'h7ff87000f, 36'h7ff7f800f, 36'h7ff770011, 36'h7ff6e0012, 36'h7ff650012,
    36'h7ff5b0014, 36'h7ff500016, 36'h7ff450016, 36'h7ff390018, 36'h7ff2c001a, 36'h7ff1e801b,
    36'h7ff0f801e, 36'h7ff00001f, 36'h7feef8021, 36'h7fede0023, 36'h7fecb8025, 36'h7feb78028,
    36'h7fea2802a, 36'h7fe8c002d, 36'h7fe740030, 36'h7fe5a8033, 36'h7fe3f8036, 36'h7fe22803a,
    36'h7fe03803e, 36'h7fde30041, 36'h7fdc00046, 36'h7fd9b004a, 36'h7fd73804f, 36'h7fd498054,
    36'h7fd1c805a, 36'h7fced005f, 36'h7fcba8065, 36'h7fc84806c, 36'h7fc4b0073, 36'h7fc0e007a,
    36'h7fbcd0082, 36'h7fb87808b, 36'h7fb3e0093, 36'h7faef809d, 36'h7fa9c00a7, 36'h7fa4380b1,
    36'h7f9e500bd, 36'h7f98080c9, 36'h7f91580d6, 36'h7f8a400e3, 36'h7f82b00f2, 36'h7f7aa0102,
    36'h7f7210112, 36'h7f68f8123, 36'h7f5f40137, 36'h7f54f014a, 36'h7f49f815f, 36'h7f3e50175,
    36'h7f31e818d, 36'h7f24b01a7, 36'h7f16a81c1, 36'h7f07b81de, 36'h7ef7d01fd, 36'h7ee6f021c,
    36'h7ed4f823f, 36'h7ec1e0263, 36'h7ead9028a, 36'h7e97f82b3, 36'h7e81082de, 36'h7e68a030d,
    36'h7e4eb833d, 36'h7e3328372, 36'h7e15e03a9, 36'h7df6c83e3, 36'h7dd5b8422, 36'h7db2a0463,
    36'h7d8d584a9, 36'h7d65c04f3, 36'h7d3bb8541, 36'h7d0f10595, 36'h7cdfb85eb, 36'h7cad70649,
    36'h7c78186ab, 36'h7c3f80713, 36'h7c0378781, 36'h7bc3d87f4, 36'h7b806086f, 36'h7b38e08f0,
    36'h7aed20978, 36'h7a9ce0a08, 36'h7a47e8a9f, 36'h79edf0b3f, 36'h798ec8be5, 36'h792a18c96,
    36'h78bfa0d4f, 36'h784f18e11, 36'h77d830edd, 36'h775aa0fb2, 36'h76d619091, 36'h764a4917a,
    36'h75b6d926e, 36'h751b7936c, 36'h7477d9474, 36'h73cb99588, 36'h7316696a6, 36'h7257f97ce,
    36'h718fe9902, 36'h70bdf9a3e, 36'h6fe1c1b87, 36'h6efb09cd7, 36'h6e0979e32, 36'h6d0cc9f96,
    36'h6c04c2101, 36'h6af122274, 36'h69d1b23ee, 36'h68a64a56d, 36'h676ec26f1, 36'h662afa879,
    36'h64daf2a01, 36'h637e92b8c, 36'h6215ead15, 36'h60a112e9b, 36'h5f202301e, 36'h5d935319a,
    36'h5bfaeb30d, 36'h5a572b478, 36'h58a8835d5, 36'h56ef53726, 36'h552c33864, 36'h535f9b993,
    36'h518a3baac, 36'h4facc3baf, 36'h4dc7ebc9b, 36'h4bdc83d6d, 36'h49eb63e24, 36'h47f56bebf,
    36'h45fb8bf3c, 36'h43feabf9c, 36'h41ffdbfda, 36'h400003ffb
  };

  // Five trits of a byte, base 3: for each two bits, {is negative, is not zero}, lowest trit first.
  localparam logic [255:0][9:0] TritTable5 = {
    10'h000, 10'h000, 10'h000, 10'h000, 10'h000, 10'h000, 10'h000, 10'h000, 10'h000, 10'h000,
    10'h000, 10'h000, 10'h000, 10'h155, 10'h154, 10'h157, 10'h151, 10'h150, 10'h153, 10'h15d,
    10'h15c, 10'h15f, 10'h145, 10'h144, 10'h147, 10'h141, 10'h140, 10'h143, 10'h14d, 10'h14c,
    10'h14f, 10'h175, 10'h174, 10'h177, 10'h171, 10'h170, 10'h173, 10'h17d, 10'h17c, 10'h17f,
    10'h115, 10'h114, 10'h117, 10'h111, 10'h110, 10'h113, 10'h11d, 10'h11c, 10'h11f, 10'h105,
    10'h104, 10'h107, 10'h101, 10'h100, 10'h103, 10'h10d, 10'h10c, 10'h10f, 10'h135, 10'h134,
    10'h137, 10'h131, 10'h130, 10'h133, 10'h13d, 10'h13c, 10'h13f, 10'h1d5, 10'h1d4, 10'h1d7,
    10'h1d1, 10'h1d0, 10'h1d3, 10'h1dd, 10'h1dc, 10'h1df, 10'h1c5, 10'h1c4, 10'h1c7, 10'h1c1,
    10'h1c0, 10'h1c3, 10'h1cd, 10'h1cc, 10'h1cf, 10'h1f5, 10'h1f4, 10'h1f7, 10'h1f1, 10'h1f0,
    10'h1f3, 10'h1fd, 10'h1fc, 10'h1ff, 10'h055, 10'h054, 10'h057, 10'h051, 10'h050, 10'h053,
    10'h05d, 10'h05c, 10'h05f, 10'h045, 10'h044, 10'h047, 10'h041, 10'h040, 10'h043, 10'h04d,
    10'h04c, 10'h04f, 10'h075, 10'h074, 10'h077, 10'h071, 10'h070, 10'h073, 10'h07d, 10'h07c,
    10'h07f, 10'h015, 10'h014, 10'h017, 10'h011, 10'h010, 10'h013, 10'h01d, 10'h01c, 10'h01f,
    10'h005, 10'h004, 10'h007, 10'h001, 10'h000, 10'h003, 10'h00d, 10'h00c, 10'h00f, 10'h035,
    10'h034, 10'h037, 10'h031, 10'h030, 10'h033, 10'h03d, 10'h03c, 10'h03f, 10'h0d5, 10'h0d4,
    10'h0d7, 10'h0d1, 10'h0d0, 10'h0d3, 10'h0dd, 10'h0dc, 10'h0df, 10'h0c5, 10'h0c4, 10'h0c7,
    10'h0c1, 10'h0c0, 10'h0c3, 10'h0cd, 10'h0cc, 10'h0cf, 10'h0f5, 10'h0f4, 10'h0f7, 10'h0f1,
    10'h0f0, 10'h0f3, 10'h0fd, 10'h0fc, 10'h0ff, 10'h355, 10'h354, 10'h357, 10'h351, 10'h350,
    10'h353, 10'h35d, 10'h35c, 10'h35f, 10'h345, 10'h344, 10'h347, 10'h341, 10'h340, 10'h343,
    10'h34d, 10'h34c, 10'h34f, 10'h375, 10'h374, 10'h377, 10'h371, 10'h370, 10'h373, 10'h37d,
    10'h37c, 10'h37f, 10'h315, 10'h314, 10'h317, 10'h311, 10'h310, 10'h313, 10'h31d, 10'h31c,
    10'h31f, 10'h305, 10'h304, 10'h307, 10'h301, 10'h300, 10'h303, 10'h30d, 10'h30c, 10'h30f,
    10'h335, 10'h334, 10'h337, 10'h331, 10'h330, 10'h333, 10'h33d, 10'h33c, 10'h33f, 10'h3d5,
    10'h3d4, 10'h3d7, 10'h3d1, 10'h3d0, 10'h3d3, 10'h3dd, 10'h3dc, 10'h3df, 10'h3c5, 10'h3c4,
    10'h3c7, 10'h3c1, 10'h3c0, 10'h3c3, 10'h3cd, 10'h3cc, 10'h3cf, 10'h3f5, 10'h3f4, 10'h3f7,
    10'h3f1, 10'h3f0, 10'h3f3, 10'h3fd, 10'h3fc, 10'h3ff
  };
endpackage
