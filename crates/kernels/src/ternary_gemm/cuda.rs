//! The products on a GPU: int8 tensor cores, exact 32-bit sums.

use std::sync::Arc;

use super::plan::{FewTokensPlan, PromptPlan, has_wide_tiles};
use crate::cuda::{Buffer, CudaError, Device, Kernel, Launch, Source};
use crate::ternary::{Layout, PANEL_ROWS, TernaryMatrix, WORD_TRITS};

pub(crate) const SOURCE: Source = Source {
    name: "ternary_gemm",
    text: concat!(include_str!("product.cuh"), include_str!("gemm.cu")),
    hopper_only: false,
    contracts: false,
};

pub(crate) const FEW_TOKENS_SOURCE: Source = Source {
    name: "ternary_few_tokens",
    text: concat!(include_str!("product.cuh"), include_str!("few_tokens.cu")),
    hopper_only: false,
    contracts: false,
};

pub(crate) const WARPGROUP_SOURCE: Source = Source {
    name: "ternary_wgmma",
    text: concat!(include_str!("product.cuh"), include_str!("wgmma.cu")),
    hopper_only: true,
    contracts: false,
};

pub(crate) const PROMPT_SOURCE: Source = Source {
    name: "ternary_prompt",
    text: concat!(include_str!("product.cuh"), include_str!("prompt.cu")),
    hopper_only: true,
    contracts: false,
};

/// Rows of a tile.
pub const TILE_ROWS: usize = 16;
/// Inputs of a tile.
pub const TILE_COLS: usize = 128;
/// Code words of a tile.
pub const TILE_WORDS: usize = 128;
/// Row tiles of a block. Matrices that share one product begin at multiples of it.
pub const BLOCK_ROW_TILES: usize = 8;
/// Buffers in shared memory, as in the source.
const STAGES: usize = 4;
/// Products of at most this many tokens may be cut along K: too few blocks otherwise.
pub const SPLIT_MAX_TOKENS: usize = 256;
/// From so many activations on, tokens by width D, fewer tokens than those take a prompt's products too: measured from D = 1024, where
/// 256 are too few, to 5120, where 96 suffice.
const PROMPT_ACTIVATIONS: usize = 400_000;

// The product of few tokens, as in its source.
const FEW_TOKENS: usize = 8;
pub(super) const FEW_TOKENS_THREADS: usize = 512;

// The warpgroup products, as in their source: of prompts, and of batches.
pub(super) const PROMPT_TOKENS: usize = 128;
pub(super) const WIDE_PROMPT_TOKENS: usize = 160;
const PROMPT_THREADS: usize = 384;
/// Stages of activations, five of 128 tokens or four of 160, then for each of eight warps the sums of 128 tokens by 32 rows, padded by
/// four.
const PROMPT_SHARED_BYTES: usize =
    5 * PROMPT_TOKENS * TILE_COLS + 8 * PROMPT_TOKENS * (2 * TILE_ROWS + 4) * 4;
const _: () = assert!(4 * WIDE_PROMPT_TOKENS == 5 * PROMPT_TOKENS);
const BATCH_TOKENS: usize = 64;
const BATCH_THREADS: usize = 256;
const BATCH_COL_TILES: usize = 8;

/// Shared memory of the batches' product for so many column tiles: those, then the sums.
fn batch_shared_bytes(col_tiles: usize) -> usize {
    let tile_bytes = BATCH_TOKENS * TILE_COLS + BLOCK_ROW_TILES * TILE_WORDS * 4;
    let sums_bytes = BATCH_TOKENS * (BLOCK_ROW_TILES * TILE_ROWS + 4) * 4;
    sums_bytes.max(col_tiles * tile_bytes)
}

/// How the products of a pass are computed: it decides how their activations lie in memory, and whether they are added to sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// Few tokens, or a device without warpgroup instructions: activations lie row by row.
    Rows,
    /// Tiles of 64 tokens by parts of K, on warpgroup instructions.
    Batch,
    /// Tiles of 128 or 160 tokens by all of K, likewise.
    Prompt,
}

impl Products {
    /// For so many rows of a model of a width D.
    pub fn of(device: &Device, rows: usize, width: usize) -> Self {
        if !has_warpgroup_product(device) || rows <= FEW_TOKENS {
            Self::Rows
        } else if rows <= SPLIT_MAX_TOKENS && rows * width < PROMPT_ACTIVATIONS {
            Self::Batch
        } else {
            Self::Prompt
        }
    }

    /// Tokens of a tile of activations; 0 where they lie row by row.
    fn tile_tokens(self) -> usize {
        match self {
            Self::Rows => 0,
            Self::Batch => BATCH_TOKENS,
            Self::Prompt => PROMPT_TOKENS,
        }
    }

    /// Whether those of so many rows are added to the sums that are there.
    fn are_added(self, rows: usize) -> bool {
        match self {
            Self::Rows => rows <= SPLIT_MAX_TOKENS,
            Self::Batch => true,
            Self::Prompt => false,
        }
    }

    /// Whether a gated unit of so many channels leaves one column for each channel, not two.
    pub fn gate_at_once(self, width: usize) -> bool {
        self == Self::Prompt && width.is_multiple_of(TILE_ROWS)
    }
}

/// Quantised activations [layers][M, K] in device memory.
#[derive(Debug)]
pub struct Quantized {
    /// [layers][capacity][stride]
    pub(crate) values: Buffer<i8>,
    /// s (divides), [layers][capacity]
    pub(crate) scales: Buffer<f32>,
    /// Sums of the integers, [layers][capacity]
    pub(crate) sums: Buffer<i32>,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) layers: usize,
    /// Rows from one layer to the next.
    pub(crate) capacity: usize,
    /// For which products: [layers][capacity][K], of a batch [layers][token tile][column tile][8][tile tokens][16], of a prompt
    /// [tile tokens][8][16], swizzled.
    pub(crate) products: Products,
}

impl Quantized {
    /// Room for nothing yet.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Ok(Self {
            values: Buffer::zeros(device, 1)?,
            scales: Buffer::zeros(device, 1)?,
            sums: Buffer::zeros(device, 1)?,
            rows: 0,
            cols: 0,
            layers: 0,
            capacity: 0,
            products: Products::Rows,
        })
    }

    /// Gives the activations a shape; what they held is lost.
    ///
    /// # Errors
    /// Products that the device does not have; no memory.
    pub fn reshape(
        &mut self,
        products: Products,
        layers: usize,
        rows: usize,
        cols: usize,
    ) -> Result<(), CudaError> {
        if products != Products::Rows && !has_warpgroup_product(self.values.device()) {
            return Err(CudaError::Shape(format!("activations of {products:?} on this device")));
        }
        self.products = products;
        let capacity = rows.next_multiple_of(self.tile_tokens().max(1));
        self.values.reserve(layers * capacity * cols.next_multiple_of(TILE_COLS))?;
        self.scales.reserve(layers * capacity)?;
        self.sums.reserve(layers * capacity)?;
        (self.layers, self.rows, self.cols, self.capacity) = (layers, rows, cols, capacity);
        Ok(())
    }

    /// Tokens of a tile; 0 where rows lie one behind the other.
    pub(crate) fn tile_tokens(&self) -> usize {
        self.products.tile_tokens()
    }

    /// Bytes from one row to the next.
    pub(crate) fn stride(&self) -> usize {
        self.cols.next_multiple_of(TILE_COLS)
    }

    /// Takes given integers [layers][M, K], for tests; scales are 1.
    ///
    /// # Errors
    /// A wrong number of values; as [`reshape`](Self::reshape).
    pub fn assign(
        &mut self,
        products: Products,
        layers: usize,
        rows: usize,
        cols: usize,
        values: &[i8],
    ) -> Result<(), CudaError> {
        if values.len() != layers * rows * cols {
            return Err(CudaError::Shape(format!("{} values", values.len())));
        }
        self.reshape(products, layers, rows, cols)?;
        let stride = self.stride();
        let mut padded = vec![0; layers * self.capacity * stride];
        let mut sums = vec![0; layers * self.capacity];
        for (at, from) in values.chunks_exact(cols).enumerate() {
            let (layer, row) = (at / rows, at % rows);
            for (k, &q) in from.iter().enumerate() {
                padded[layer * self.capacity * stride + self.place(row, k)] = q;
            }
            sums[layer * self.capacity + row] = from.iter().map(|&q| i32::from(q)).sum();
        }
        self.values.write(0, &padded)?;
        self.sums.write(0, &sums)?;
        self.scales.write(0, &vec![1.0; layers * self.capacity])
    }

    /// Where a value lies within its layer.
    fn place(&self, row: usize, k: usize) -> usize {
        let stride = self.stride();
        let tokens = self.tile_tokens();
        if tokens == 0 {
            return row * stride + k;
        }
        // As the quantiser's source says: input 32 t + 16 half + 4 f + b of a tile is byte 4 t + b of chunk
        // 2 f + half.
        let (tile, t, half, f, b) = (k / TILE_COLS, k / 32 % 4, k / 16 % 2, k / 4 % 4, k % 4);
        let block = row / tokens * (stride / TILE_COLS) + tile;
        let (chunk, token) = (2 * f + half, row % tokens);
        let place = if tokens == PROMPT_TOKENS {
            token * 8 + (chunk ^ (token % 8))
        } else {
            chunk * tokens + token
        };
        (block * 8 * tokens + place) * 16 + 4 * t + b
    }

    /// s of a row.
    ///
    /// # Errors
    /// The driver's.
    pub fn read_scale(&self, layer: usize, row: usize) -> Result<f32, CudaError> {
        let mut scale = [0.0];
        self.scales.read(layer * self.capacity + row, &mut scale)?;
        Ok(scale[0])
    }
}

/// Whether a device runs the warpgroup product.
fn has_warpgroup_product(device: &Device) -> bool {
    device.capability() == (9, 0)
}

/// Sums of a product [M, row tiles · 16] in device memory.
#[derive(Debug)]
pub struct Sums {
    pub(crate) values: Buffer<i32>,
    /// Columns from one row to the next.
    pub(crate) stride: usize,
    /// Whether readers leave zeros, and all of it is zero between products.
    pub(crate) adds: bool,
    /// Whether they are floats instead: silu(a) ⊙ b of a gated unit, [M, `stride`].
    pub(crate) are_gated: bool,
}

impl Sums {
    /// Room for nothing yet.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Ok(Self { values: Buffer::zeros(device, 1)?, stride: 0, adds: false, are_gated: false })
    }

    /// Prepares for the products of a pass over some tokens, with at most `stride` columns. Those that are added to the sums find
    /// zeros.
    ///
    /// # Errors
    /// No memory.
    pub fn begin(
        &mut self,
        products: Products,
        rows: usize,
        stride: usize,
    ) -> Result<(), CudaError> {
        self.values.reserve(rows * stride)?;
        self.adds = products.are_added(rows);
        if self.adds {
            self.values.clear()?;
        }
        Ok(())
    }

    /// Reads `rows` rows, for tests and observers.
    ///
    /// # Errors
    /// The driver's.
    pub fn read(&self, rows: usize) -> Result<Vec<i32>, CudaError> {
        let mut values = vec![0; rows * self.stride];
        self.values.read(0, &mut values)?;
        Ok(values)
    }

    /// Columns from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }
}

/// Where a matrix, or several that one product computes, lies among tiles.
#[derive(Clone, Copy, Debug, Default)]
pub struct TileMatrix {
    /// First tile.
    pub first: usize,
    /// Tiles of sixteen outputs.
    pub row_tiles: usize,
    /// Tiles of 128 inputs.
    pub col_tiles: usize,
    /// Row tiles that share an input; the next ones take the next layer's of [`Quantized`].
    pub segment_tiles: usize,
}

impl TileMatrix {
    /// One matrix [N, K].
    pub fn single(first: usize, n: usize, k: usize) -> Self {
        let row_tiles = n.div_ceil(TILE_ROWS);
        Self { first, row_tiles, col_tiles: k.div_ceil(TILE_COLS), segment_tiles: row_tiles }
    }

    /// Several matrices of the same shape [N, K], each with its own input.
    pub fn stacked(first: usize, matrices: usize, n: usize, k: usize) -> Self {
        let segment_tiles = n.div_ceil(TILE_ROWS).next_multiple_of(BLOCK_ROW_TILES);
        Self {
            first,
            row_tiles: matrices * segment_tiles,
            col_tiles: k.div_ceil(TILE_COLS),
            segment_tiles,
        }
    }

    /// Tiles of all of it.
    pub fn tiles(&self) -> usize {
        self.row_tiles * self.col_tiles
    }

    /// Columns of the sums.
    pub fn columns(&self) -> usize {
        self.row_tiles * TILE_ROWS
    }
}

#[repr(C)]
struct Args {
    weights: u64,
    q: u64,
    q_sums: u64,
    out: u64,
    m: u32,
    rows: u32,
    row_tiles: u32,
    col_tiles: u32,
    segment_tiles: u32,
    splits: u32,
}

#[repr(C)]
struct FewTokensArgs {
    product: Args,
    plan: FewTokensPlan,
}

#[repr(C)]
struct PromptArgs {
    product: Args,
    plan: PromptPlan,
}

#[repr(C)]
struct GatedArgs {
    product: PromptArgs,
    scales: u64,
    gamma: f32,
}

#[repr(C)]
struct RepackArgs {
    words: u64,
    tiles: u64,
    row_tiles: u32,
    units: u32,
    col_tiles: u32,
}

/// Products on Hopper's warpgroup instructions.
#[derive(Debug)]
struct WarpgroupKernels {
    batch: Kernel,
    prompt: Kernel,
    /// The same with tiles of 160 tokens.
    wide_prompt: Kernel,
    /// Of a prompt's gated unit.
    gated_prompt: Kernel,
}

/// The kernels.
#[derive(Debug)]
pub struct Gemm {
    device: Arc<Device>,
    /// Tokens and threads of a block.
    shapes: [(usize, usize, Kernel); 5],
    /// For up to [`FEW_TOKENS`] tokens that fit into shared memory.
    few_tokens: Kernel,
    /// On devices that have them.
    warpgroup: Option<WarpgroupKernels>,
    repack: Kernel,
}

impl Gemm {
    /// Compiles and loads.
    ///
    /// # Errors
    /// No compiler, or its or the driver's complaints.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        let shape = |tokens, threads, name| {
            let kernel = device.kernel(SOURCE, name, shared_bytes(tokens))?;
            Ok::<_, CudaError>((tokens, threads, kernel))
        };
        Ok(Self {
            device: Arc::clone(device),
            shapes: [
                shape(8, 128, "gemm_128x8")?,
                shape(16, 128, "gemm_128x16")?,
                shape(32, 128, "gemm_128x32")?,
                shape(64, 128, "gemm_128x64")?,
                shape(128, 256, "gemm_128x128")?,
            ],
            few_tokens: device.kernel(FEW_TOKENS_SOURCE, "few_tokens", device.shared_bytes())?,
            warpgroup: has_warpgroup_product(device)
                .then(|| {
                    let prompt = |name| device.kernel(PROMPT_SOURCE, name, PROMPT_SHARED_BYTES);
                    Ok::<_, CudaError>(WarpgroupKernels {
                        batch: device.kernel(
                            WARPGROUP_SOURCE,
                            "wgmma_128x64",
                            batch_shared_bytes(BATCH_COL_TILES),
                        )?,
                        prompt: prompt("prompt_product")?,
                        wide_prompt: prompt("wide_prompt_product")?,
                        gated_prompt: prompt("gated_prompt_product")?,
                    })
                })
                .transpose()?,
            repack: device.kernel(SOURCE, "repack", 0)?,
        })
    }

    /// Copies a matrix to the device, into tiles from number `first` on. `staging` holds it as it is on the
    /// CPU meanwhile.
    ///
    /// # Errors
    /// Too few tiles; no memory.
    pub fn upload(
        &self,
        matrix: &TernaryMatrix,
        staging: &mut Buffer<u32>,
        tiles: &mut Buffer<u32>,
        first: usize,
    ) -> Result<(), CudaError> {
        const _: () = assert!(PANEL_ROWS == TILE_ROWS && WORD_TRITS * 8 == TILE_COLS);
        let (row_tiles, col_tiles) = (matrix.panels(), matrix.cols().div_ceil(TILE_COLS));
        let words = row_tiles * col_tiles * TILE_WORDS;
        if (first * TILE_WORDS).checked_add(words).is_none_or(|end| end > tiles.len()) {
            return Err(CudaError::Shape(format!("no room for {words} code words")));
        }
        let mut unpacked = Vec::new();
        let codes: &[u32] = match matrix.layout() {
            Layout::TwoBit => bytemuck::cast_slice(matrix.codes()),
            _ => {
                matrix.for_each_word(|words| unpacked.extend_from_slice(words));
                &unpacked
            }
        };
        staging.reserve(codes.len())?;
        staging.write(0, codes)?;
        let args = RepackArgs {
            words: staging.address(0),
            tiles: tiles.address(first * TILE_WORDS),
            row_tiles: row_tiles as u32,
            units: matrix.words() as u32,
            col_tiles: col_tiles as u32,
        };
        let launch = Launch::new([words.div_ceil(256), 1, 1], 256, 0);
        // SAFETY: the kernel reads the matrix's words and writes `words` words, which were checked to fit.
        unsafe { self.repack.launch(launch, &args) }
    }

    /// `sums[m, n] = Σ_k q[m, k] · t[n, k]` for the matrices of `matrix` and all rows of `q`.
    ///
    /// # Errors
    /// Shapes that do not fit together; the driver's.
    pub fn multiply(
        &self,
        tiles: &Buffer<u32>,
        matrix: TileMatrix,
        q: &Quantized,
        sums: &mut Sums,
    ) -> Result<(), CudaError> {
        let mut args = product_args(tiles, matrix, q, sums, matrix.columns())?;
        let m = q.rows;
        let multiprocessors = self.device.multiprocessors();
        let few_tokens = (sums.adds && m <= FEW_TOKENS)
            .then(|| FewTokensPlan::new(matrix, multiprocessors))
            .map(|plan| (plan, plan.shared_bytes(m * q.layers)))
            .filter(|&(_, shared)| shared <= self.device.shared_bytes());
        if let Some((plan, shared)) = few_tokens {
            let launch = Launch::new([multiprocessors, 1, 1], FEW_TOKENS_THREADS, shared);
            let args = FewTokensArgs { product: args, plan };
            // SAFETY: every buffer was checked to hold what the shapes say, and the shared memory holds the activations.
            return unsafe { self.few_tokens.launch(launch.overlapping(), &args) };
        }
        if let Some(kernels) = self.for_prompt(q) {
            let (kernel, plan) = if has_wide_tiles(matrix, m, multiprocessors) {
                (&kernels.wide_prompt, PromptPlan::wide(matrix, m))
            } else {
                (&kernels.prompt, PromptPlan::regular(matrix, m, false, multiprocessors))
            };
            let args = PromptArgs { product: args, plan };
            // SAFETY: every buffer was checked to hold what the shapes say; the kernel clamps rows and tokens.
            return unsafe { kernel.launch(self.prompt_launch(), &args) };
        }
        let col_tiles = matrix.col_tiles;
        let row_blocks = matrix.row_tiles.div_ceil(BLOCK_ROW_TILES);
        // Blocks over K, so that there are about so many for each multiprocessor.
        let splits = |per_multiprocessor: usize, token_blocks: usize, fewest: usize| {
            let blocks = per_multiprocessor * self.device.multiprocessors();
            let wanted = blocks / (row_blocks * token_blocks);
            if sums.adds { wanted.clamp(fewest, col_tiles) } else { 1 }
        };
        let (tokens, threads, shared, splits, kernel) = match &self.warpgroup {
            Some(kernels) if q.products == Products::Batch => {
                let splits =
                    splits(1, m.div_ceil(BATCH_TOKENS), col_tiles.div_ceil(BATCH_COL_TILES));
                let shared = batch_shared_bytes(col_tiles.div_ceil(splits));
                (BATCH_TOKENS, BATCH_THREADS, shared, splits, &kernels.batch)
            }
            _ => {
                let shape = self.shapes.iter().find(|(tokens, ..)| m <= *tokens);
                let &(tokens, threads, ref kernel) = shape.unwrap_or(&self.shapes[4]);
                (tokens, threads, shared_bytes(tokens), splits(2, m.div_ceil(tokens), 1), kernel)
            }
        };
        args.splits = splits as u32;
        let grid = [row_blocks, m.div_ceil(tokens), splits];
        let launch = Launch::new(grid, threads, shared).overlapping();
        // SAFETY: every buffer was checked to hold what the shapes say; the kernel clamps rows and tokens.
        unsafe { kernel.launch(launch, &args) }
    }

    /// The product of a gated unit of `width` channels, the rows of a and as many of b, for outputs of γ `gamma`: silu(a) ⊙ b where
    /// [`Products::gate_at_once`] says so, else the sums of both.
    ///
    /// # Errors
    /// Shapes that do not fit together; the driver's.
    pub fn multiply_gated_unit(
        &self,
        tiles: &Buffer<u32>,
        (matrix, width): (TileMatrix, usize),
        q: &Quantized,
        gamma: f32,
        sums: &mut Sums,
    ) -> Result<(), CudaError> {
        let Some(kernels) = self.for_prompt(q).filter(|_| q.products.gate_at_once(width)) else {
            return self.multiply(tiles, matrix, q, sums);
        };
        if matrix.columns() != 2 * width || q.layers != 1 {
            return Err(CudaError::Shape(format!(
                "a gated unit of {width} channels, {matrix:?} with {} inputs",
                q.layers
            )));
        }
        let product = product_args(tiles, matrix, q, sums, width)?;
        sums.are_gated = true;
        let plan = PromptPlan::regular(matrix, q.rows, true, self.device.multiprocessors());
        let product = PromptArgs { product, plan };
        let args = GatedArgs { product, scales: q.scales.address(0), gamma };
        // SAFETY: every buffer was checked to hold what the shapes say, the sums a float for each channel; the kernel
        // clamps rows and tokens.
        unsafe { kernels.gated_prompt.launch(self.prompt_launch(), &args) }
    }

    fn for_prompt(&self, q: &Quantized) -> Option<&WarpgroupKernels> {
        self.warpgroup.as_ref().filter(|_| q.products == Products::Prompt)
    }

    fn prompt_launch(&self) -> Launch {
        let grid = [self.device.multiprocessors(), 1, 1];
        Launch::new(grid, PROMPT_THREADS, PROMPT_SHARED_BYTES)
    }
}

/// Arguments of a product whose results have so many columns.
fn product_args(
    tiles: &Buffer<u32>,
    matrix: TileMatrix,
    q: &Quantized,
    sums: &mut Sums,
    columns: usize,
) -> Result<Args, CudaError> {
    let m = q.rows;
    let fits = m > 0
        && matrix.tiles() > 0
        && (matrix.first + matrix.tiles()) * TILE_WORDS <= tiles.len()
        && q.stride() == matrix.col_tiles * TILE_COLS
        && matrix.row_tiles == q.layers * matrix.segment_tiles
        && (q.layers == 1 || matrix.segment_tiles.is_multiple_of(BLOCK_ROW_TILES))
        && m * columns <= sums.values.len()
        && sums.adds == q.products.are_added(m);
    if !fits {
        return Err(CudaError::Shape(format!(
            "a product of {matrix:?} with {} times {m} rows of {}",
            q.layers, q.cols
        )));
    }
    (sums.stride, sums.are_gated) = (columns, false);
    Ok(Args {
        weights: tiles.address(matrix.first * TILE_WORDS),
        q: q.values.address(0),
        q_sums: q.sums.address(0),
        out: sums.values.address(0),
        m: m as u32,
        rows: q.capacity as u32,
        row_tiles: matrix.row_tiles as u32,
        col_tiles: matrix.col_tiles as u32,
        segment_tiles: matrix.segment_tiles as u32,
        splits: 1,
    })
}

fn shared_bytes(tokens: usize) -> usize {
    STAGES * tokens * TILE_COLS
}
