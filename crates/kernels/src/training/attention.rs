//! Causal attention and RoPE.

use super::{ATTENTION, THREADS, Training, View, ViewMut, quotient, require};
use crate::attention::Shape;
use crate::cuda::{CudaError, Launch};

/// Rows that a block of attention works on.
const ROWS: usize = 64;
const ATTENTION_THREADS: usize = 128;
/// Largest head.
const MAX_HEAD: usize = 128;

#[repr(C)]
#[derive(Default)]
struct AttentionArgs {
    qkv: u64,
    y: u64,
    log_sums: u64,
    dy: u64,
    deltas: u64,
    d_qkv: u64,
    length: u32,
    heads: u32,
    head: u32,
    width: u32,
    scale: f32,
}

#[repr(C)]
struct RopeArgs {
    qkv: u64,
    table: u64,
    rows: u32,
    length: u32,
    heads: u32,
    head: u32,
    width: u32,
    theta: f32,
    sign: f32,
}

impl Training {
    /// Rotates queries and keys of `qkv` [M, 3D] in place by their position; backward with `inverse`.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn rope(
        &mut self,
        shape: Shape,
        theta: f32,
        qkv: ViewMut<'_, u16>,
        inverse: bool,
    ) -> Result<(), CudaError> {
        let width = shape.heads * shape.head_size;
        let rows = quotient(qkv.len, 3 * width)?;
        require(rows == shape.sequences * shape.length, "qkv")?;
        require(shape.head_size.is_multiple_of(2), "a head (it must be even)")?;
        let key = (shape.length, shape.head_size, theta.to_bits());
        self.rope_table.reserve(shape.length * shape.head_size)?;
        let args = RopeArgs {
            qkv: qkv.address(),
            table: self.rope_table.address(0),
            rows: rows as u32,
            length: shape.length as u32,
            heads: shape.heads as u32,
            head: shape.head_size as u32,
            width: width as u32,
            theta,
            sign: if inverse { -1.0 } else { 1.0 },
        };
        self.mark("RoPE")?;
        if self.rope_key != Some(key) {
            let pairs = shape.length * shape.head_size / 2;
            let launch = Launch::new([pairs.div_ceil(THREADS), 1, 1], THREADS, 0);
            // SAFETY: the table was made large enough.
            unsafe { self.launch(ATTENTION, "rope_table", launch, &args)? };
            self.rope_key = Some(key);
        }
        let launch = Launch::new([rows, 1, 1], THREADS, 0);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(ATTENTION, "rope_rows", launch, &args) }
    }

    /// Causal attention of `qkv` [M, 3D]: `y` [M, D] and `log_sums` [M, H].
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn attention(
        &mut self,
        shape: Shape,
        qkv: View<'_, u16>,
        y: ViewMut<'_, u16>,
        log_sums: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let mut args = attention_args(shape, qkv)?;
        require(y.len == qkv.len / 3, "y")?;
        require(log_sums.len == shape.sequences * shape.length * shape.heads, "log_sums")?;
        (args.y, args.log_sums) = (y.address(), log_sums.address());
        self.mark("attention")?;
        let (name, channels) = match shape.head_size {
            ..=64 => ("attention_forward_64", 64),
            _ => ("attention_forward_128", 128),
        };
        let launch = launch_of(shape, tiles_bytes(channels, 3 * ROWS));
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(ATTENTION, name, launch, &args) }
    }

    /// Gradients of [`attention`](Self::attention). Sets `d_qkv`.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn attention_backward(
        &mut self,
        shape: Shape,
        qkv: View<'_, u16>,
        y: View<'_, u16>,
        log_sums: View<'_, f32>,
        dy: View<'_, u16>,
        d_qkv: ViewMut<'_, u16>,
    ) -> Result<(), CudaError> {
        let mut args = attention_args(shape, qkv)?;
        let (rows, heads) = (shape.sequences * shape.length, shape.heads);
        require(y.len == qkv.len / 3 && dy.len == y.len && d_qkv.len == qkv.len, "a tensor")?;
        require(log_sums.len == rows * heads, "log_sums")?;
        self.deltas.reserve(rows * heads)?;
        (args.y, args.log_sums, args.dy) = (y.address(), log_sums.address(), dy.address());
        (args.deltas, args.d_qkv) = (self.deltas.address(0), d_qkv.address());
        self.mark("attention, backward")?;
        let of_all = AttentionArgs { length: rows as u32, ..args };
        let deltas = Launch::new([(rows * heads).div_ceil(THREADS / 32), 1, 1], THREADS, 0);
        let (queries, keys, channels, at_once) = match shape.head_size {
            ..=64 => ("attention_queries_64", "attention_keys_64", 64, 64),
            _ => ("attention_queries_128", "attention_keys_128", 128, 32),
        };
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe {
            self.launch(ATTENTION, "attention_deltas", deltas, &of_all)?;
            let launch = launch_of(shape, tiles_bytes(channels, 4 * ROWS));
            self.launch(ATTENTION, queries, launch, &args)?;
            let launch = launch_of(shape, tiles_bytes(channels, 2 * ROWS + 2 * at_once));
            self.launch(ATTENTION, keys, launch, &args)
        }
    }
}

fn attention_args(shape: Shape, qkv: View<'_, u16>) -> Result<AttentionArgs, CudaError> {
    let width = shape.heads * shape.head_size;
    require(qkv.len == shape.sequences * shape.length * 3 * width && width > 0, "qkv")?;
    if shape.head_size > MAX_HEAD || shape.heads > 65_535 || shape.sequences > 65_535 {
        return Err(CudaError::Shape(format!(
            "attention with {} heads of {} channels over {} sequences: the kernels take heads of at most \
             {MAX_HEAD} channels, and 65,535 heads and sequences",
            shape.heads, shape.head_size, shape.sequences
        )));
    }
    Ok(AttentionArgs {
        qkv: qkv.address(),
        length: shape.length as u32,
        heads: shape.heads as u32,
        head: shape.head_size as u32,
        width: width as u32,
        scale: 1.0 / (shape.head_size as f32).sqrt(),
        ..AttentionArgs::default()
    })
}

fn launch_of(shape: Shape, shared_bytes: usize) -> Launch {
    let grid = [shape.length.div_ceil(ROWS), shape.heads, shape.sequences];
    Launch::new(grid, ATTENTION_THREADS, shared_bytes)
}

/// Shared memory of `rows` rows of a head.
fn tiles_bytes(channels: usize, rows: usize) -> usize {
    rows * (channels + 8) * size_of::<u16>()
}
