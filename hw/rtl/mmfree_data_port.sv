// Moves vectors between data memory and vector memory through an AXI4 port as wide as a word.
// Bursts never cross a 4096-byte page.
module mmfree_data_port #(
  parameter int unsigned RowLanes  = 2,
  parameter int unsigned Words     = 1024,
  parameter int unsigned AddrWidth = 40,
  localparam int unsigned DataBytes  = 4 * RowLanes,
  localparam int unsigned VAddrWidth = $clog2(Words)
) (
  input  logic                      clk_i,
  input  logic                      rst_ni,

  // Command
  input  logic                      cmd_valid_i,
  output logic                      cmd_ready_o,
  input  logic                      cmd_is_store_i,
  input  logic [AddrWidth-1:0]      cmd_addr_i,
  input  logic [15:0]               cmd_word_i,
  input  logic [15:0]               cmd_n_i,
  output logic                      done_o,

  // Vector memory
  output logic [VAddrWidth-1:0]     raddr_o,
  input  logic [RowLanes-1:0][31:0] rdata_i,
  output logic                      we_o,
  output logic [VAddrWidth-1:0]     waddr_o,
  output logic [RowLanes-1:0][31:0] wdata_o,

  // AXI4 read
  output logic                      arvalid_o,
  input  logic                      arready_i,
  output logic [AddrWidth-1:0]      araddr_o,
  output logic [7:0]                arlen_o,
  input  logic                      rvalid_i,
  output logic                      rready_o,
  input  logic [DataBytes*8-1:0]    rdata_axi_i,

  // AXI4 write
  output logic                      awvalid_o,
  input  logic                      awready_i,
  output logic [AddrWidth-1:0]      awaddr_o,
  output logic [7:0]                awlen_o,
  output logic                      wvalid_o,
  input  logic                      wready_i,
  output logic [DataBytes*8-1:0]    wdata_axi_o,
  output logic                      wlast_o,
  input  logic                      bvalid_i,
  output logic                      bready_o
);

  localparam int unsigned LaneShift = $clog2(RowLanes);
  localparam int unsigned ByteShift = $clog2(DataBytes);
  localparam int unsigned MaxBurst  = 4096 / DataBytes < 64 ? 4096 / DataBytes : 64;

  typedef enum logic [2:0] {
    Idle,
    Load,
    WriteAddress,
    Fetch,
    Hold,
    WriteData,
    Response,
    Done
  } state_e;

  state_e               state_d, state_q;
  logic [AddrWidth-1:0] addr_q;
  logic [15:0]          word_q;
  logic [16:0]          request_q;  // words that no burst was asked for yet
  logic [16:0]          left_q;     // words that were not moved yet
  logic [8:0]           burst, beat_q;
  logic [12:0]          page;

  assign page  = (13'd4096 - {1'b0, addr_q[11:0]}) >> ByteShift;
  always_comb begin
    burst = 9'(MaxBurst);
    if (13'(burst) > page) burst = 9'(page);
    if (17'(burst) > request_q) burst = 9'(request_q);
  end

  assign cmd_ready_o = state_q == Idle;
  assign done_o      = state_q == Done;
  assign arvalid_o   = state_q == Load && request_q != '0;
  assign araddr_o    = addr_q;
  assign arlen_o     = 8'(burst - 1'b1);
  assign rready_o    = state_q == Load;
  assign awvalid_o   = state_q == WriteAddress;
  assign awaddr_o    = addr_q;
  assign awlen_o     = 8'(burst - 1'b1);
  assign wvalid_o    = state_q == WriteData;
  assign wlast_o     = beat_q == 9'd1;
  assign bready_o    = state_q == Response;
  assign raddr_o     = VAddrWidth'(word_q);
  assign we_o        = rvalid_i && rready_o;
  assign waddr_o     = VAddrWidth'(word_q);
  assign wdata_o     = rdata_axi_i;

  always_ff @(posedge clk_i) begin
    if (state_q == Hold) wdata_axi_o <= rdata_i;
  end

  always_comb begin
    state_d = state_q;
    unique case (state_q)
      Idle:         if (cmd_valid_i) state_d = cmd_is_store_i ? WriteAddress : Load;
      Load:         if (we_o && left_q == 17'd1) state_d = Done;
      WriteAddress: if (awready_i) state_d = Fetch;
      Fetch:        state_d = Hold;
      Hold:         state_d = WriteData;
      WriteData:    if (wready_i) state_d = wlast_o ? Response : Hold;
      Response:     if (bvalid_i) state_d = request_q == '0 ? Done : WriteAddress;
      Done:         state_d = Idle;
      default:      state_d = Idle;
    endcase
  end

  always_ff @(posedge clk_i or negedge rst_ni) begin
    if (!rst_ni) begin
      state_q   <= Idle;
      addr_q    <= '0;
      word_q    <= '0;
      request_q <= '0;
      left_q    <= '0;
      beat_q    <= '0;
    end else begin
      state_q <= state_d;
      unique case (state_q)
        Idle: begin
          addr_q    <= cmd_addr_i;
          word_q    <= cmd_word_i;
          request_q <= (17'(cmd_n_i) + 17'(RowLanes - 1)) >> LaneShift;
          left_q    <= (17'(cmd_n_i) + 17'(RowLanes - 1)) >> LaneShift;
        end
        Load: begin
          if (arvalid_o && arready_i) begin
            addr_q    <= addr_q + (AddrWidth'(burst) << ByteShift);
            request_q <= request_q - 17'(burst);
          end
          if (we_o) begin
            word_q <= word_q + 1'b1;
            left_q <= left_q - 1'b1;
          end
        end
        WriteAddress: begin
          beat_q <= burst;
          if (awready_i) begin
            addr_q    <= addr_q + (AddrWidth'(burst) << ByteShift);
            request_q <= request_q - 17'(burst);
          end
        end
        Hold:      word_q <= word_q + 1'b1;
        WriteData: if (wready_i) beat_q <= beat_q - 1'b1;
        default: ;
      endcase
    end
  end

`ifdef MMFREE_ASSERTIONS
  assert property (@(posedge clk_i) disable iff (!rst_ni)
                   wvalid_o && !wready_i |=> wvalid_o && $stable(wdata_axi_o));
  assert property (@(posedge clk_i) disable iff (!rst_ni)
                   arvalid_o && !arready_i |=> arvalid_o && $stable(araddr_o));
`endif

endmodule
