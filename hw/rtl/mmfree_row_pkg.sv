// Passes of the row-wise unit over its vectors.
package mmfree_row_pkg;
  typedef enum logic [3:0] {
    PassSquare,   // adds up a * a
    PassMax,      // largest |a|
    PassBest,     // largest a and its index
    PassNorm,     // (a * scale) * b
    PassQuant,    // a * scale, to 8 bits
    PassAdd,      // a + b
    PassMul,      // a * b
    PassSigmoid,  // sigmoid(a)
    PassSilu,     // a * sigmoid(a)
    PassSwiGlu,   // a * sigmoid(a) * b
    PassGate,     // sigmoid(a) + b * (1 - sigmoid(a))
    PassRecur     // s + b * (c - s) with s = a * sigmoid(a)
  } pass_e;

  // Cycles from the data of a lane's inputs to its result.
  localparam int unsigned LaneLatency = 9;
endpackage
