//! Measures prefill and decode, and holds them against the machine's memory bandwidth.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use mmfree_kernels::bandwidth::ReadBuffer;
use serde::Serialize;

use crate::engine::{Engine, EngineOptions};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::state::State;

/// Token ids are drawn from the first this many of the vocabulary.
pub const DISTINCT_TOKENS: usize = 1024;
/// Larger than any cache that a few cores share.
const READ_BUFFER_BYTES: usize = 512 << 20;

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens decoded after it, one by one.
    pub decode_tokens: usize,
    /// Runs that count.
    pub repetitions: usize,
    /// Runs before them that do not.
    pub warmup: usize,
    /// Threads and kernel tier.
    pub engine: EngineOptions,
}

/// Median, smallest and largest of some measurements.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    /// Median.
    pub median: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            (values[middle - 1] + values[middle]) / 2.0
        };
        Self { median, min: values[0], max: values[values.len() - 1] }
    }
}

/// What was measured. Serialised as the one object of `mmfree bench --json`.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The model: a preset's name or a path.
    pub model: String,
    /// Version of this program.
    pub version: &'static str,
    /// Processor, where the system tells.
    pub processor: Option<String>,
    /// Kernel tier.
    pub backend: &'static str,
    /// Threads that worked.
    pub threads: usize,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens decoded.
    pub decode_tokens: usize,
    /// Runs that counted.
    pub repetitions: usize,
    /// Median prefill speed.
    pub prefill_tokens_per_s: f64,
    /// Median decode speed.
    pub decode_tokens_per_s: f64,
    /// Prefill speed of the runs.
    pub prefill: Spread,
    /// Decode speed of the runs.
    pub decode: Spread,
    /// Packed weights that one decoded token streams.
    pub bytes_per_token: usize,
    /// Median speed at which all threads together read memory.
    pub read_bandwidth_bytes_per_s: f64,
    /// Reading speed of the runs.
    pub read_bandwidth: Spread,
    /// Median over runs of decode speed times bytes a token over the reading speed next to that run.
    pub share_of_read_bandwidth: f64,
    /// Largest resident memory of the process up to the end of the first prefill and decode; the buffer
    /// for reading comes later. `None` where the system does not tell.
    pub peak_rss_bytes: Option<u64>,
    /// Energy of the processor package for a decoded token. `None` where no RAPL counter is readable.
    pub joules_per_token: Option<f64>,
    /// Memory of one sequence.
    pub state_bytes: usize,
}

/// Runs the benchmark. `progress` is told the run that begins, from 0.
///
/// # Errors
/// Options of which nothing can be measured, or no memory.
pub fn run(
    name: &str,
    model: Arc<Model>,
    options: &Options,
    progress: &mut dyn FnMut(usize),
) -> Result<Report> {
    if options.prompt_tokens == 0 || options.decode_tokens == 0 || options.repetitions == 0 {
        return Err(Error::Invalid(
            "prompt tokens, decode tokens and repetitions must all be at least 1".to_owned(),
        ));
    }
    let vocabulary = model.config().vocab_size.min(DISTINCT_TOKENS) as u32;
    let bytes_per_token = model.streamed_bytes();
    let tokens: Vec<u32> = (0..options.prompt_tokens + options.decode_tokens)
        .scan(1u32, |state, _| {
            *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            Some((*state >> 8) % vocabulary)
        })
        .collect();
    let (prompt, continuation) = tokens.split_at(options.prompt_tokens);
    let mut engine = Engine::new(Arc::clone(&model), &options.engine)?;
    let energy = EnergyCounters::find();

    let once = |engine: &mut Engine| -> Result<Timings> {
        let mut state = State::new(&model);
        let start = Instant::now();
        engine.prefill(&mut state, prompt, &AtomicBool::new(false))?;
        let prefill_s = start.elapsed().as_secs_f64();
        let energy_before = energy.read();
        let start = Instant::now();
        for &token in continuation {
            engine.decode(&mut state, token)?;
        }
        let decode_s = start.elapsed().as_secs_f64();
        let joules = energy.joules_since(energy_before.as_deref());
        Ok(Timings { prefill_s, decode_s, joules })
    };

    progress(0);
    once(&mut engine)?;
    let peak_rss_bytes = peak_rss_bytes();
    let buffer = ReadBuffer::new(READ_BUFFER_BYTES).map_err(|reason| {
        Error::Invalid(format!("no memory to measure the read bandwidth with: {reason}"))
    })?;
    let mut bandwidths = Vec::with_capacity(options.repetitions);
    let mut runs = Vec::with_capacity(options.repetitions);
    for repetition in 1..options.warmup.max(1) + options.repetitions {
        progress(repetition);
        let bandwidth = engine.read_bandwidth(&buffer);
        let timings = once(&mut engine)?;
        if repetition >= options.warmup {
            bandwidths.push(bandwidth);
            runs.push(timings);
        }
    }

    let decode_tokens = options.decode_tokens as f64;
    let decode_speeds: Vec<f64> = runs.iter().map(|run| decode_tokens / run.decode_s).collect();
    let shares = decode_speeds.iter().zip(&bandwidths);
    let shares = shares.map(|(speed, bandwidth)| speed * bytes_per_token as f64 / bandwidth);
    let share = Spread::of(shares.collect());
    let prefill_speeds = runs.iter().map(|run| options.prompt_tokens as f64 / run.prefill_s);
    let prefill = Spread::of(prefill_speeds.collect());
    let decode = Spread::of(decode_speeds);
    let read_bandwidth = Spread::of(bandwidths);
    let joules: Option<Vec<f64>> = runs.iter().map(|run| run.joules).collect();
    Ok(Report {
        model: name.to_owned(),
        version: env!("CARGO_PKG_VERSION"),
        processor: processor_name(),
        backend: engine.backend(),
        threads: engine.threads(),
        prompt_tokens: options.prompt_tokens,
        decode_tokens: options.decode_tokens,
        repetitions: runs.len(),
        prefill_tokens_per_s: prefill.median,
        decode_tokens_per_s: decode.median,
        prefill,
        decode,
        bytes_per_token,
        read_bandwidth_bytes_per_s: read_bandwidth.median,
        read_bandwidth,
        share_of_read_bandwidth: share.median,
        peak_rss_bytes,
        joules_per_token: joules.map(|joules| Spread::of(joules).median / decode_tokens),
        state_bytes: std::mem::size_of_val(State::new(&model).hidden()),
    })
}

struct Timings {
    prefill_s: f64,
    decode_s: f64,
    joules: Option<f64>,
}

impl Engine {
    /// Bytes per second at which this engine's threads read a buffer together: the median of three
    /// passes.
    fn read_bandwidth(&self, buffer: &ReadBuffer) -> f64 {
        let passes = (0..3).map(|_| {
            let start = Instant::now();
            std::hint::black_box(self.read(buffer));
            buffer.bytes() as f64 / start.elapsed().as_secs_f64()
        });
        Spread::of(passes.collect()).median
    }
}

/// Largest resident memory of this process so far (`VmHWM`), where the system tells.
pub fn peak_rss_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

fn processor_name() -> Option<String> {
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("model name"))?;
    Some(line.trim_start_matches([' ', '\t', ':']).to_owned())
}

/// Readable RAPL counters of the processor packages (Intel's and AMD's have the same interface).
struct EnergyCounters(Vec<PathBuf>);

impl EnergyCounters {
    fn find() -> Self {
        let zones = fs::read_dir("/sys/class/powercap").into_iter().flatten().flatten();
        // A package is `intel-rapl:0`; its parts, `intel-rapl:0:0`, are contained in it.
        let is_package = |path: &Path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.strip_prefix("intel-rapl:").is_some_and(|rest| !rest.contains(':'))
        };
        let packages = zones.map(|zone| zone.path()).filter(|path| is_package(path));
        Self(packages.filter(|path| read_number(&path.join("energy_uj")).is_some()).collect())
    }

    /// Microjoules of each package. `None` without counters.
    fn read(&self) -> Option<Vec<u64>> {
        if self.0.is_empty() {
            return None;
        }
        self.0.iter().map(|zone| read_number(&zone.join("energy_uj"))).collect()
    }

    fn joules_since(&self, before: Option<&[u64]>) -> Option<f64> {
        let after = self.read()?;
        let mut microjoules = 0;
        for ((zone, before), after) in self.0.iter().zip(before?).zip(after) {
            microjoules += match after.checked_sub(*before) {
                Some(difference) => difference,
                // The counter began anew.
                None => {
                    read_number(&zone.join("max_energy_range_uj"))?.checked_sub(*before)? + after
                }
            };
        }
        Some(microjoules as f64 / 1e6)
    }
}

fn read_number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use mmfree_kernels::ternary::Layout;

    use super::*;
    use crate::config::ModelConfig;

    #[test]
    fn medians_of_odd_and_even_counts() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]).median, 2.0);
        let spread = Spread::of(vec![4.0, 1.0, 2.0, 3.0]);
        assert_eq!((spread.median, spread.min, spread.max), (2.5, 1.0, 4.0));
    }

    #[test]
    fn a_report_is_consistent_and_impossible_options_are_refused() {
        let config = ModelConfig {
            hidden_size: 64,
            intermediate_size: 128,
            num_hidden_layers: 2,
            vocab_size: 500,
            ..ModelConfig::preset("370m").expect("preset")
        };
        let layout = Layout::Base3;
        let model = Arc::new(Model::random(&config, layout, DISTINCT_TOKENS, 3).expect("model"));
        let options = Options {
            prompt_tokens: 40,
            decode_tokens: 3,
            repetitions: 3,
            warmup: 1,
            engine: EngineOptions { threads: Some(2), backend: None },
        };
        let mut begun = 0;
        let report = run("probe", Arc::clone(&model), &options, &mut |_| begun += 1).expect("runs");
        assert_eq!((report.repetitions, begun), (3, 4));
        // Two blocks of four square and two channel-mixer matrices, and a head padded to 512 rows. A row
        // of 64 trits has four units of four bytes, one of 128 trits four and three.
        let bytes = 2 * ((4 * 64 + 2 * 128) * 16 + 64 * 28) + 512 * 16;
        assert_eq!(report.bytes_per_token, bytes);
        assert_eq!(report.state_bytes, 2 * 64 * 4);
        assert!(report.decode.min <= report.decode_tokens_per_s);
        assert!(report.decode_tokens_per_s <= report.decode.max);
        assert!(report.share_of_read_bandwidth > 0.0 && report.read_bandwidth.min > 0.0);
        let nothing = Options { decode_tokens: 0, ..options };
        run("probe", model, &nothing, &mut |_| {}).expect_err("nothing to measure");
    }
}
