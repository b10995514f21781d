//! Measures prefill and decode, and holds them against the machine's memory bandwidth.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use mmfree_kernels::bandwidth::ReadBuffer;
use mmfree_kernels::bandwidth::cuda::DeviceReadBuffer;
use mmfree_kernels::cuda::Device;
use serde::Serialize;

use crate::engine::{Engine, EngineOptions};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::state::State;

/// Token ids are drawn from the first this many of the vocabulary.
pub const DISTINCT_TOKENS: usize = 1024;
/// NVML's energy counter moves about every 0.1 s.
const GPU_ENERGY_MIN_SECONDS: f64 = 1.0;
/// Where runs are shorter, so many of them are counted that they take as long as this.
const GPU_ENERGY_SECONDS: f64 = 2.0;
/// Many times the cache of a GPU.
const DEVICE_READ_BUFFER_BYTES: usize = 4 << 30;
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
    /// Sequences that are decoded side by side. The prompt is fed to one; if there are more, each makes a step that does
    /// not count.
    pub batch: usize,
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
    /// Of at least one value.
    pub fn of(mut values: Vec<f64>) -> Self {
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
    /// `cuda`, or the CPU's kernel tier.
    pub backend: &'static str,
    /// The GPU, if the model ran on one.
    pub device: Option<String>,
    /// Threads that worked.
    pub threads: usize,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens decoded, of each sequence.
    pub decode_tokens: usize,
    /// Sequences decoded side by side.
    pub batch: usize,
    /// Runs that counted.
    pub repetitions: usize,
    /// Median prefill speed.
    pub prefill_tokens_per_s: f64,
    /// Median decode speed, of all sequences together.
    pub decode_tokens_per_s: f64,
    /// Prefill speed of the runs.
    pub prefill: Spread,
    /// Decode speed of the runs.
    pub decode: Spread,
    /// Packed weights that one decoded token streams, or one of each sequence together.
    pub bytes_per_token: usize,
    /// Median speed at which all threads together, or the GPU, read memory.
    pub read_bandwidth_bytes_per_s: f64,
    /// Reading speed of the runs.
    pub read_bandwidth: Spread,
    /// Median over runs of decode steps a second times bytes streamed over the reading speed next to that
    /// run.
    pub share_of_read_bandwidth: f64,
    /// Largest resident memory of the process up to the end of the first prefill and decode; the buffer
    /// for reading comes later. `None` where the system does not tell.
    pub peak_rss_bytes: Option<u64>,
    /// Largest memory of the GPU that weights, states and activations took. `None` on the CPU.
    pub peak_device_bytes: Option<usize>,
    /// Energy of the processor package, or of the GPU, for a decoded token. `None` where no counter (RAPL,
    /// NVML) is readable.
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
    let counts = [options.prompt_tokens, options.decode_tokens, options.repetitions, options.batch];
    if counts.contains(&0) {
        return Err(Error::Invalid(
            "prompt tokens, decode tokens, repetitions and batch must all be at least 1".to_owned(),
        ));
    }
    let vocabulary = model.config().vocab_size.min(DISTINCT_TOKENS) as u32;
    let tokens: Vec<u32> = (0..options.prompt_tokens + options.decode_tokens)
        .scan(1u32, |state, _| {
            *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            Some((*state >> 8) % vocabulary)
        })
        .collect();
    let (prompt, continuation) = tokens.split_at(options.prompt_tokens);
    let mut engine = Engine::new(Arc::clone(&model), &options.engine)?;
    let gpu = engine.gpu().map(|(device, bytes)| (Arc::clone(device), bytes));
    let device = gpu.as_ref().map(|(device, _)| device);
    let bytes_per_token = gpu.as_ref().map_or_else(|| model.streamed_bytes(), |(_, bytes)| *bytes);
    let energy = match device {
        Some(device) => EnergyCounters::of_gpu(device),
        None => EnergyCounters::find(),
    };

    let decode_batch = |engine: &mut Engine, states: &mut [State], steps: usize| -> Result<()> {
        let tokens = vec![continuation[0]; states.len()];
        let mut states: Vec<_> = states.iter_mut().collect();
        engine.greedy_batch(&mut states, &tokens, steps)?;
        Ok(())
    };
    let decode = |engine: &mut Engine, states: &mut [State]| -> Result<()> {
        match (states, gpu.is_some()) {
            ([state], false) => {
                for &token in continuation {
                    engine.decode(state, token)?;
                }
            }
            // As generation runs: a token that was chosen on the GPU is fed without a look from the host.
            ([state], true) => drop(engine.greedy(state, continuation[0], continuation.len())?),
            (states, _) => decode_batch(engine, states, continuation.len())?,
        }
        Ok(())
    };
    let once = |engine: &mut Engine| -> Result<Timings> {
        let mut states = vec![State::new(&model); options.batch];
        let start = Instant::now();
        engine.prefill(&mut states[0], prompt, &AtomicBool::new(false))?;
        let prefill_s = start.elapsed().as_secs_f64();
        if options.batch > 1 {
            // A GPU gets states at their first step.
            decode_batch(engine, &mut states, 1)?;
        }
        let energy_before = energy.read();
        let start = Instant::now();
        decode(engine, &mut states)?;
        let decode_s = start.elapsed().as_secs_f64();
        let joules = energy.joules_since(energy_before.as_deref(), decode_s);
        Ok(Timings { prefill_s, decode_s, joules })
    };
    // Of a run, over so many that a GPU's counter has moved often enough.
    let joules_of_many = |engine: &mut Engine| -> Result<Option<f64>> {
        let Some(before) = energy.read() else { return Ok(None) };
        let mut states = vec![State::new(&model); options.batch];
        let (start, mut runs) = (Instant::now(), 0.0);
        while start.elapsed().as_secs_f64() < GPU_ENERGY_SECONDS {
            decode(engine, &mut states)?;
            runs += 1.0;
        }
        let joules = energy.joules_since(Some(&before), start.elapsed().as_secs_f64());
        Ok(joules.map(|joules| joules / runs))
    };

    progress(0);
    once(&mut engine)?;
    let peak_rss_bytes = peak_rss_bytes();
    let peak_device_bytes = device.map(|device| device.peak_bytes());
    let yardstick = Yardstick::new(device)?;
    let mut bandwidths = Vec::with_capacity(options.repetitions);
    let mut runs = Vec::with_capacity(options.repetitions);
    for repetition in 1..options.warmup.max(1) + options.repetitions {
        progress(repetition);
        let bandwidth = yardstick.measure(&engine)?;
        let timings = once(&mut engine)?;
        if repetition >= options.warmup {
            bandwidths.push(bandwidth);
            runs.push(timings);
        }
    }

    let steps = options.decode_tokens as f64;
    let decode_tokens = steps * options.batch as f64;
    let decode_speeds: Vec<f64> = runs.iter().map(|run| decode_tokens / run.decode_s).collect();
    let shares = runs.iter().zip(&bandwidths);
    let shares =
        shares.map(|(run, bandwidth)| steps / run.decode_s * bytes_per_token as f64 / bandwidth);
    let share = Spread::of(shares.collect());
    let prefill_speeds = runs.iter().map(|run| options.prompt_tokens as f64 / run.prefill_s);
    let prefill = Spread::of(prefill_speeds.collect());
    let decode = Spread::of(decode_speeds);
    let read_bandwidth = Spread::of(bandwidths);
    let joules: Option<Vec<f64>> = runs.iter().map(|run| run.joules).collect();
    let joules = match joules {
        Some(joules) => Some(Spread::of(joules).median),
        None => joules_of_many(&mut engine)?,
    };
    Ok(Report {
        model: name.to_owned(),
        version: env!("CARGO_PKG_VERSION"),
        processor: processor_name(),
        backend: engine.backend(),
        device: device.map(|device| device.name().to_owned()),
        threads: engine.threads(),
        prompt_tokens: options.prompt_tokens,
        decode_tokens: options.decode_tokens,
        batch: options.batch,
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
        peak_device_bytes,
        joules_per_token: joules.map(|joules| joules / decode_tokens),
        state_bytes: std::mem::size_of_val(State::new(&model).hidden()),
    })
}

struct Timings {
    prefill_s: f64,
    decode_s: f64,
    joules: Option<f64>,
}

/// Memory to read, as a yardstick.
enum Yardstick {
    Host(ReadBuffer),
    Gpu(DeviceReadBuffer),
}

impl Yardstick {
    fn new(device: Option<&Arc<Device>>) -> Result<Self> {
        Ok(match device {
            None => Self::Host(ReadBuffer::new(READ_BUFFER_BYTES).map_err(|reason| {
                Error::Invalid(format!("no memory to measure the read bandwidth with: {reason}"))
            })?),
            Some(device) => Self::Gpu(DeviceReadBuffer::new(device, DEVICE_READ_BUFFER_BYTES)?),
        })
    }

    /// Bytes per second at which the engine's threads, or the GPU, read memory: the median of three passes.
    fn measure(&self, engine: &Engine) -> Result<f64> {
        let passes = (0..3).map(|_| match self {
            Self::Host(buffer) => {
                let start = Instant::now();
                std::hint::black_box(engine.read(buffer));
                Ok(buffer.bytes() as f64 / start.elapsed().as_secs_f64())
            }
            Self::Gpu(buffer) => Ok(buffer.measure()?),
        });
        Ok(Spread::of(passes.collect::<Result<_>>()?).median)
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

/// Where energy is counted.
enum EnergyCounters {
    /// Readable RAPL counters of the processor packages (Intel's and AMD's have the same interface).
    Packages(Vec<PathBuf>),
    /// A GPU by its unique id.
    Gpu(Box<nvml_wrapper::Nvml>, String),
    None,
}

impl EnergyCounters {
    fn of_gpu(device: &Device) -> Self {
        match (nvml_wrapper::Nvml::init(), device.uuid()) {
            (Ok(nvml), Ok(uuid)) => Self::Gpu(Box::new(nvml), uuid),
            _ => Self::None,
        }
    }

    fn find() -> Self {
        let zones = fs::read_dir("/sys/class/powercap").into_iter().flatten().flatten();
        // A package is `intel-rapl:0`; its parts, `intel-rapl:0:0`, are contained in it.
        let is_package = |path: &Path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.strip_prefix("intel-rapl:").is_some_and(|rest| !rest.contains(':'))
        };
        let packages = zones.map(|zone| zone.path()).filter(|path| is_package(path));
        let readable = |path: &PathBuf| read_number(&path.join("energy_uj")).is_some();
        Self::Packages(packages.filter(readable).collect())
    }

    /// Microjoules of each package or of the GPU. `None` without counters.
    fn read(&self) -> Option<Vec<u64>> {
        match self {
            Self::Packages(zones) if !zones.is_empty() => {
                zones.iter().map(|zone| read_number(&zone.join("energy_uj"))).collect()
            }
            Self::Gpu(nvml, uuid) => {
                let device = nvml.device_by_uuid(uuid.as_str()).ok()?;
                Some(vec![device.total_energy_consumption().ok()? * 1000])
            }
            _ => None,
        }
    }

    /// Energy since a reading. `None` for a GPU in a run too short for its counter, which moves in steps.
    fn joules_since(&self, before: Option<&[u64]>, seconds: f64) -> Option<f64> {
        let after = self.read()?;
        let mut microjoules = 0;
        let Self::Packages(zones) = self else {
            if seconds < GPU_ENERGY_MIN_SECONDS {
                return None;
            }
            return Some(after.first()?.checked_sub(*before?.first()?)? as f64 / 1e6);
        };
        for ((zone, before), after) in zones.iter().zip(before?).zip(after) {
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
            batch: 1,
            engine: EngineOptions { threads: Some(2), backend: Some("cpu".to_owned()) },
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
