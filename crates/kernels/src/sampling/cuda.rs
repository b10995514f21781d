//! Drawing on a GPU.

use std::sync::Arc;

use super::{MAX_LOGITS, Params};
use crate::cuda::{Buffer, CudaError, Device, Kernel, Launch, Source};

pub(crate) const SOURCE: Source = Source {
    name: "sampling",
    text: include_str!("sampling.cu"),
    hopper_only: false,
    contracts: false,
};

// As in the source.
const THREADS: usize = 1024;
const MAX_BLOCKS: usize = 8;
/// In place of a token: there is no valid distribution.
const INVALID: u32 = u32::MAX;

#[repr(C)]
#[derive(Clone, Copy)]
struct Row {
    scale: f32,
    penalty: f32,
    top_k: u32,
    window: u32,
    top_p: u64,
    min_weight: u64,
    row: u32,
    recent_at: u32,
    recent_len: u32,
    lowest: f32,
}

// SAFETY: zeros are numbers.
unsafe impl bytemuck::Zeroable for Row {}
// SAFETY: numbers only, without gaps: 4 · 4 + 2 · 8 + 4 · 4 bytes.
unsafe impl bytemuck::Pod for Row {}

#[repr(C)]
struct Args {
    logits: u64,
    likelihoods: u64,
    rows: u64,
    recent: u64,
    words: u64,
    drawn: u64,
    tokens: u64,
    keys: u64,
    passes: u64,
    pass: u32,
    vocab: u32,
    key_count: u32,
    round: u32,
}

/// What is drawn from a row of logits.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Number of the row.
    pub row: usize,
    /// How.
    pub params: Params,
    /// The tokens so far, of which the last `params.window` count.
    pub recent: &'a [u32],
    /// Whether a logit of −∞ is an error, and not a token that is never drawn.
    pub only_finite: bool,
}

/// Where a kernel on the device finds what it feeds next.
#[derive(Debug)]
pub enum Next<'a> {
    /// Only the host asks for what is drawn.
    Host,
    /// The keys of the decoding kernel, in a round.
    #[allow(missing_docs)]
    Keys { keys: &'a mut Buffer<u64>, round: u64 },
    /// A token for each request.
    Tokens(&'a mut Buffer<u32>),
}

/// The kernel, what it draws from and what it has drawn.
#[derive(Debug)]
pub struct Sampling {
    device: Arc<Device>,
    kernel: Kernel,
    likelihoods: Buffer<f32>,
    rows: Buffer<u64>,
    recent: Buffer<u32>,
    words: Buffer<u64>,
    drawn: Buffer<u32>,
    /// Rows that are drawn from, and how often.
    row_count: usize,
    draws: usize,
    /// Rows of logits that they come from, at least, and logits of a row.
    logit_rows: usize,
    vocab: usize,
}

impl Sampling {
    /// Longest window of the repetition penalty.
    pub const MAX_WINDOW: usize = THREADS;

    /// Compiles and loads.
    ///
    /// # Errors
    /// No compiler, or its or the driver's complaints.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Ok(Self {
            device: Arc::clone(device),
            kernel: device.kernel(SOURCE, "draw_rows", 0)?,
            likelihoods: Buffer::zeros(device, 1)?,
            rows: Buffer::zeros(device, 1)?,
            recent: Buffer::zeros(device, 1)?,
            words: Buffer::zeros(device, 1)?,
            drawn: Buffer::zeros(device, 1)?,
            row_count: 0,
            draws: 0,
            logit_rows: 0,
            vocab: 0,
        })
    }

    /// Prepares `draws` draws from each of some rows of `vocab` logits. `words` are the random words [draws, requests].
    ///
    /// # Errors
    /// Numbers that do not fit; no memory; the driver's.
    pub fn begin(
        &mut self,
        requests: &[Request<'_>],
        vocab: usize,
        draws: usize,
        words: &[u64],
    ) -> Result<(), CudaError> {
        let has_window = |r: &Request<'_>| r.params.penalty == 1.0 || r.params.window <= THREADS;
        let fits = !requests.is_empty()
            && (1..=MAX_LOGITS).contains(&vocab)
            && words.len() == draws * requests.len()
            && requests.iter().all(has_window);
        if !fits {
            let (rows, words) = (requests.len(), words.len());
            return Err(CudaError::Shape(format!(
                "{draws} draws from {rows} rows of {vocab} logits by {words} words"
            )));
        }
        let mut recent = Vec::new();
        let rows: Vec<Row> = requests
            .iter()
            .map(|&Request { row, params, recent: tokens, only_finite }| {
                let recent_at = recent.len();
                let mut recent_len = 0;
                if params.penalty != 1.0 {
                    recent_len = tokens.len().min(params.window);
                    recent.extend_from_slice(&tokens[tokens.len() - recent_len..]);
                    recent.resize(recent.len() + draws, 0);
                }
                Row {
                    scale: params.scale,
                    penalty: params.penalty,
                    top_k: u32::try_from(params.top_k).unwrap_or(u32::MAX),
                    window: params.window.min(THREADS) as u32,
                    top_p: params.top_p,
                    min_weight: params.min_weight,
                    row: row as u32,
                    recent_at: recent_at as u32,
                    recent_len: recent_len as u32,
                    lowest: if only_finite { f32::MIN } else { f32::NEG_INFINITY },
                }
            })
            .collect();
        let rows: &[u64] = bytemuck::cast_slice(&rows);
        self.rows.reserve(rows.len())?;
        self.rows.write(0, rows)?;
        self.recent.reserve(recent.len())?;
        self.recent.write(0, &recent)?;
        self.words.reserve(words.len())?;
        self.words.write(0, words)?;
        self.drawn.reserve(words.len())?;
        self.likelihoods.reserve(requests.len() * vocab)?;
        self.row_count = requests.len();
        self.draws = draws;
        self.logit_rows = requests.iter().map(|request| request.row + 1).max().unwrap_or(0);
        self.vocab = vocab;
        Ok(())
    }

    /// Submits draw number `pass` from the rows of `logits`, whose recent tokens' change by the penalty. `keys` tells the token of
    /// the only row to the decoding kernel.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn draw(
        &mut self,
        logits: &mut Buffer<f32>,
        pass: usize,
        next: Next<'_>,
    ) -> Result<(), CudaError> {
        let has_room = !matches!(&next, Next::Tokens(tokens) if tokens.len() < self.row_count);
        if pass >= self.draws || !has_room {
            let (draws, rows) = (self.draws, self.row_count);
            return Err(CudaError::Shape(format!("draw {pass} of {draws} from {rows} rows")));
        }
        let args = match next {
            Next::Host => NOTHING,
            Next::Keys { keys, round } => Args {
                keys: keys.address(0),
                key_count: keys.len() as u32,
                round: (round & 1) as u32,
                ..NOTHING
            },
            Next::Tokens(tokens) => Args { tokens: tokens.address(0), ..NOTHING },
        };
        self.launch(logits, Args { pass: pass as u32, ..args })
    }

    /// Submits the draw whose number `passes` counts, from 1. The tokens also go to `tokens`, one for each request. At most as
    /// many passes as there are draws.
    ///
    /// # Errors
    /// As [`draw`](Self::draw).
    pub fn draw_counted(
        &mut self,
        logits: &mut Buffer<f32>,
        tokens: &mut Buffer<u32>,
        passes: &Buffer<u32>,
    ) -> Result<(), CudaError> {
        if tokens.len() < self.row_count {
            return Err(CudaError::Shape(format!("{} drawn tokens", self.row_count)));
        }
        self.launch(
            logits,
            Args { tokens: tokens.address(0), passes: passes.address(0), ..NOTHING },
        )
    }

    fn launch(&mut self, logits: &mut Buffer<f32>, args: Args) -> Result<(), CudaError> {
        if self.row_count == 0 || logits.len() < self.logit_rows * self.vocab {
            return Err(CudaError::Shape(format!("draws from {} rows", self.logit_rows)));
        }
        let args = Args {
            logits: logits.address(0),
            likelihoods: self.likelihoods.address(0),
            rows: self.rows.address(0),
            recent: self.recent.address(0),
            words: self.words.address(0),
            drawn: self.drawn.address(0),
            vocab: self.vocab as u32,
            ..args
        };
        let cluster = cluster_for(self.row_count, self.vocab, &self.device);
        let launch = Launch::new([self.row_count * cluster, 1, 1], THREADS, 0).overlapping();
        let launch = Launch { cluster, ..launch };
        // SAFETY: logits were checked; `begin` made room for as many draws of as many rows.
        unsafe { self.kernel.launch(launch, &args) }
    }

    /// The tokens that were drawn, [draws, requests], after all work; `None` if a row had no valid distribution: a logit that is
    /// NaN or +∞, or all −∞.
    ///
    /// # Errors
    /// The driver's, also those of earlier work.
    pub fn drawn(&self) -> Result<Option<Vec<u32>>, CudaError> {
        let mut tokens = vec![0; self.draws * self.row_count];
        self.drawn.read(0, &mut tokens)?;
        Ok((!tokens.contains(&INVALID)).then_some(tokens))
    }
}

/// Blocks that draw from a row: as many as have work, and as run at once. Of clusters of more than two blocks fewer do, for
/// each lies in one of the groups of multiprocessors.
fn cluster_for(rows: usize, vocab: usize, device: &Device) -> usize {
    let is_worth = |&blocks: &usize| {
        let all = device.multiprocessors();
        let room = if blocks > 2 { all * 3 / 4 } else { all };
        blocks * rows <= room && (blocks - 1) * THREADS < vocab
    };
    let most = MAX_BLOCKS.min(device.max_cluster());
    let sizes = (0..).map(|bits| 1 << bits).take_while(|&blocks| blocks <= most);
    sizes.take_while(is_worth).last().unwrap_or(1)
}

const NOTHING: Args = Args {
    logits: 0,
    likelihoods: 0,
    rows: 0,
    recent: 0,
    words: 0,
    drawn: 0,
    tokens: 0,
    keys: 0,
    passes: 0,
    pass: 0,
    vocab: 0,
    key_count: 0,
    round: 0,
};
