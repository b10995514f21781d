//! Checkpoints: everything that a run needs to go on, bit for bit.
//!
//! A checkpoint is a directory `checkpoints/step-00000000` of the run:
//!
//! | file | holds |
//! |---|---|
//! | `config.json`, `model.safetensors`, tokenizer | the model as a Hugging Face directory: it can be packed and run as it is |
//! | `exp_avg.safetensors`, `exp_avg_sq.safetensors` | AdamW's moments under the names of their parameters |
//! | `trainer.json` | [`State`]: version, step, configuration |
//! | `CHECKSUMS` | XXH3-64 of each of them, and of these lines |
//!
//! It appears complete or not at all, is on the disk when [`Checkpoints::save`] returns, and does not
//! depend on how many processes wrote it.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use mmfree::checkpoint::{FloatType, safetensors};
use mmfree::output::{self, OutputDirectory};
use twox_hash::XxHash3_64;

mod state;

pub use state::{GuardState, State};

use crate::architecture::Architecture;
use crate::error::{Error, Result};
use crate::parameters::ParameterLayout;
use crate::weights;

/// A flat buffer of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// The weights.
    Parameters,
    /// AdamW's first moment.
    FirstMoment,
    /// AdamW's second moment.
    SecondMoment,
}

impl Values {
    /// All of them, in the order in which they are written.
    pub const ALL: [Self; 3] = [Self::Parameters, Self::FirstMoment, Self::SecondMoment];

    fn file(self) -> &'static str {
        match self {
            Self::Parameters => "model.safetensors",
            Self::FirstMoment => "exp_avg.safetensors",
            Self::SecondMoment => "exp_avg_sq.safetensors",
        }
    }
}

const STATE: &str = "trainer.json";
const CHECKSUMS: &str = "CHECKSUMS";
/// Largest of the small files.
const MAX_SMALL_FILE: u64 = 1 << 24;

/// The checkpoints of a run.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    directory: PathBuf,
}

/// A checkpoint whose checksums were right when it was opened.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    path: PathBuf,
    /// What it says of the run.
    pub state: State,
}

impl Checkpoints {
    /// The checkpoints in a run's directory. Removes what a killed process began; no other process may be
    /// writing there.
    ///
    /// # Errors
    /// The directory cannot be made or read.
    pub fn open(run: &Path) -> Result<Self> {
        let directory = run.join("checkpoints");
        fs::create_dir_all(&directory)
            .map_err(|reason| Error::Write { file: directory.display().to_string(), reason })?;
        output::remove_unfinished(&directory)?;
        Ok(Self { directory })
    }

    /// The path of a step's checkpoint.
    pub fn path(&self, step: u64) -> PathBuf {
        self.directory.join(format!("step-{step:08}"))
    }

    /// Steps that have a checkpoint, ascending.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let error = |reason| Error::Read { file: self.directory.display().to_string(), reason };
        let mut steps = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(error)? {
            let name = entry.map_err(error)?.file_name();
            let step: Option<u64> =
                name.to_str().and_then(|name| name.strip_prefix("step-")?.parse().ok());
            steps.extend(step);
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// The newest checkpoint that is whole, and a message for each newer one that is not.
    ///
    /// # Errors
    /// The directory cannot be read; a checkpoint of another version.
    pub fn newest(&self) -> Result<(Option<Checkpoint>, Vec<String>)> {
        let mut damaged = Vec::new();
        for step in self.steps()?.into_iter().rev() {
            match Checkpoint::open(&self.path(step)) {
                Ok(checkpoint) => return Ok((Some(checkpoint), damaged)),
                Err(error) => damaged.push(error.to_string()),
            }
        }
        if let [first, ..] = &damaged[..] {
            // Going on from nothing would overwrite what can perhaps be saved.
            return Err(Error::Checkpoint {
                checkpoint: self.directory.display().to_string(),
                what: format!("no checkpoint is whole; the newest: {first}"),
            });
        }
        Ok((None, damaged))
    }

    /// Writes a checkpoint. `values` fills a buffer with the whole of one of [`Values`]; `files` are the
    /// tokenizer's.
    ///
    /// # Errors
    /// Errors of writing, a full disk for example; earlier checkpoints are untouched then.
    pub fn save(
        &self,
        state: &State,
        architecture: &Architecture,
        files: &[(String, Vec<u8>)],
        values: &mut dyn FnMut(Values, &mut [f32]) -> Result<()>,
    ) -> Result<PathBuf> {
        let path = self.path(state.step);
        let mut writer = Writer::create(&path)?;
        writer.file("config.json", format!("{:#}\n", architecture.to_json()).as_bytes())?;
        let layout = architecture.layout();
        let mut flat = vec![0.0; layout.len()];
        for part in Values::ALL {
            values(part, &mut flat)?;
            writer.values(part, &layout, &flat)?;
        }
        for (name, bytes) in files {
            writer.file(name, bytes)?;
        }
        let json = serde_json::to_vec_pretty(state).map_err(|error| {
            Error::Invalid(format!("the state of the run cannot be written: {error}"))
        })?;
        writer.file(STATE, &json)?;
        writer.commit()?;
        Ok(path)
    }

    /// Removes all but the newest `keep` checkpoints.
    ///
    /// # Errors
    /// Errors of the file system.
    pub fn prune(&self, keep: usize) -> Result<()> {
        let steps = self.steps()?;
        for &step in &steps[..steps.len().saturating_sub(keep)] {
            output::remove_directory(&self.path(step))?;
        }
        Ok(())
    }
}

impl Checkpoint {
    /// Opens a checkpoint and compares every checksum.
    ///
    /// # Errors
    /// A file that is missing or was changed; another version.
    pub fn open(path: &Path) -> Result<Self> {
        let label = path.display().to_string();
        let damaged = |what| Error::Checkpoint { checkpoint: label.clone(), what };
        let sums = read_small(&path.join(CHECKSUMS))?;
        let sums = String::from_utf8(sums)
            .map_err(|_| damaged(format!("{CHECKSUMS} is not a list of checksums")))?;
        let body = sums.strip_suffix('\n').unwrap_or("");
        let (lines, last) = body.rsplit_once('\n').unwrap_or(("", ""));
        let lines = format!("{lines}\n");
        if last != checksum_line(&XxHash3_64::oneshot(lines.as_bytes()), CHECKSUMS) {
            return Err(damaged(format!("{CHECKSUMS} is damaged")));
        }
        for line in lines.lines() {
            let name = line.split_once("  ").map_or("", |(_, name)| name);
            if name.contains(['/', '\\']) {
                return Err(damaged(format!("{CHECKSUMS} names {name}, which is no plain name")));
            }
            let found = checksum_of(&path.join(name))?;
            if line != checksum_line(&found, name) {
                return Err(damaged(format!(
                    "{name} is damaged: its checksum is not that of {CHECKSUMS}"
                )));
            }
        }
        let state = State::read(&label, &read_small(&path.join(STATE))?)?;
        Ok(Self { path: path.to_owned(), state })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fills a buffer with a flat buffer of the checkpoint.
    ///
    /// # Errors
    /// Errors of reading; a buffer of another length.
    pub fn read(&self, part: Values, flat: &mut [f32]) -> Result<()> {
        let path = self.path.join(part.file());
        let error = |reason| Error::Read { file: path.display().to_string(), reason };
        let mut file = File::open(&path).map_err(error)?;
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(error)?;
        let header = u64::from_le_bytes(length).saturating_add(8);
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(flat);
        let found = file.metadata().map_err(error)?.len();
        if found != header.saturating_add(bytes.len() as u64) {
            return Err(Error::Checkpoint {
                checkpoint: self.path.display().to_string(),
                what: format!(
                    "{} has {found} bytes, the configuration demands {}",
                    part.file(),
                    header.saturating_add(bytes.len() as u64)
                ),
            });
        }
        file.seek(SeekFrom::Start(header)).map_err(error)?;
        file.read_exact(bytes).map_err(error)?;
        if cfg!(target_endian = "big") {
            for value in flat {
                *value = f32::from_bits(value.to_bits().swap_bytes());
            }
        }
        Ok(())
    }
}

/// A checkpoint that is being written.
struct Writer {
    output: OutputDirectory,
    sums: String,
}

impl Writer {
    fn create(path: &Path) -> Result<Self> {
        Ok(Self { output: OutputDirectory::create(path)?, sums: String::new() })
    }

    fn file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.output.write_file(name, bytes)?;
        self.sums += &format!("{}\n", checksum_line(&XxHash3_64::oneshot(bytes), name));
        Ok(())
    }

    fn values(&mut self, part: Values, layout: &ParameterLayout, flat: &[f32]) -> Result<()> {
        let mut hash = XxHash3_64::new();
        self.output.write_with(part.file(), |file| {
            let mut hashing = Hashing { file, hash: &mut hash };
            safetensors::write(&mut hashing, &weights::tensors(layout, flat), FloatType::F32)
        })?;
        self.sums +=
            &format!("{}\n", checksum_line(&std::hash::Hasher::finish(&hash), part.file()));
        Ok(())
    }

    fn commit(mut self) -> Result<()> {
        let own = XxHash3_64::oneshot(self.sums.as_bytes());
        self.sums += &format!("{}\n", checksum_line(&own, CHECKSUMS));
        self.output.write_file(CHECKSUMS, self.sums.as_bytes())?;
        Ok(self.output.commit()?)
    }
}

/// Computes a checksum of what passes through.
struct Hashing<'a> {
    file: &'a mut dyn Write,
    hash: &'a mut XxHash3_64,
}

impl Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        std::hash::Hasher::write(self.hash, &bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// As `xxhsum` prints it.
fn checksum_line(sum: &u64, name: &str) -> String {
    format!("{sum:016x}  {name}")
}

fn checksum_of(path: &Path) -> Result<u64> {
    let error = |reason| Error::Read { file: path.display().to_string(), reason };
    let mut file = File::open(path).map_err(error)?;
    let (mut hash, mut buffer) = (XxHash3_64::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).map_err(error)? {
            0 => return Ok(std::hash::Hasher::finish(&hash)),
            read => std::hash::Hasher::write(&mut hash, &buffer[..read]),
        }
    }
}

fn read_small(path: &Path) -> Result<Vec<u8>> {
    let error = |reason| Error::Read { file: path.display().to_string(), reason };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(error)?;
    file.take(MAX_SMALL_FILE).read_to_end(&mut bytes).map_err(error)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TrainConfig;
    use mmfree::config::ModelConfig;

    fn architecture() -> Architecture {
        let mut config = ModelConfig::preset("370m").unwrap();
        (config.vocab_size, config.hidden_size) = (11, 8);
        (config.intermediate_size, config.num_hidden_layers) = (12, 2);
        Architecture::MatMulFree(config)
    }

    fn config() -> TrainConfig {
        TrainConfig::parse("x", "", &["data.train=x".parse().unwrap()]).unwrap()
    }

    fn fill(part: Values, flat: &mut [f32]) -> Result<()> {
        let base = part as usize * 1000;
        flat.iter_mut().enumerate().for_each(|(at, value)| *value = (base + at) as f32 * 0.1);
        Ok(())
    }

    fn save(checkpoints: &Checkpoints, step: u64) -> PathBuf {
        let state = State::new(step, &config(), 11, "tokens", GuardState::default());
        let tokenizer = [("tokenizer.json".to_owned(), b"{}".to_vec())];
        checkpoints.save(&state, &architecture(), &tokenizer, &mut fill).unwrap()
    }

    #[test]
    fn what_is_saved_reads_back_and_is_a_model() {
        let run = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(run.path()).unwrap();
        assert!(checkpoints.newest().unwrap().0.is_none());
        for step in [5, 10, 20] {
            save(&checkpoints, step);
        }
        let (newest, damaged) = checkpoints.newest().unwrap();
        let newest = newest.unwrap();
        assert_eq!((newest.state.step, damaged.len()), (20, 0));
        let len = architecture().layout().len();
        for part in Values::ALL {
            let (mut found, mut expected) = (vec![0.0; len], vec![0.0; len]);
            newest.read(part, &mut found).unwrap();
            fill(part, &mut expected).unwrap();
            assert_eq!(found, expected);
            assert!(newest.read(part, &mut found[1..]).is_err());
        }
        let (loaded, parameters) = weights::load(newest.path()).unwrap();
        assert_eq!(loaded, architecture());
        assert_eq!(parameters[7], 0.7);
        checkpoints.prune(2).unwrap();
        assert_eq!(checkpoints.steps().unwrap(), [10, 20]);
    }

    #[test]
    fn any_changed_byte_is_noticed_and_the_one_before_is_taken() {
        let run = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(run.path()).unwrap();
        save(&checkpoints, 1);
        let path = save(&checkpoints, 2);
        for entry in fs::read_dir(&path).unwrap() {
            let file = entry.unwrap().path();
            let whole = fs::read(&file).unwrap();
            for at in (0..whole.len()).step_by(whole.len() / 40 + 1) {
                let mut changed = whole.clone();
                changed[at] ^= 1;
                fs::write(&file, &changed).unwrap();
                let (newest, damaged) = checkpoints.newest().unwrap();
                assert_eq!(newest.unwrap().state.step, 1, "{} at {at}", file.display());
                assert_eq!(damaged.len(), 1);
            }
            fs::write(&file, &whole[..whole.len() - 1]).unwrap();
            assert_eq!(checkpoints.newest().unwrap().0.unwrap().state.step, 1);
            fs::remove_file(&file).unwrap();
            assert_eq!(checkpoints.newest().unwrap().0.unwrap().state.step, 1);
            fs::write(&file, &whole).unwrap();
        }
        assert_eq!(checkpoints.newest().unwrap().0.unwrap().state.step, 2);
    }

    #[test]
    fn a_failed_save_leaves_nothing_and_the_others_whole() {
        let run = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(run.path()).unwrap();
        save(&checkpoints, 1);
        let state = State::new(2, &config(), 11, "tokens", GuardState::default());
        let mut fail = |part, flat: &mut [f32]| match part {
            Values::SecondMoment => Err(Error::Invalid("no".to_owned())),
            _ => fill(part, flat),
        };
        assert!(checkpoints.save(&state, &architecture(), &[], &mut fail).is_err());
        assert_eq!(fs::read_dir(run.path().join("checkpoints")).unwrap().count(), 1);
        assert_eq!(checkpoints.newest().unwrap().0.unwrap().state.step, 1);
    }

    #[test]
    fn another_configuration_is_refused_with_the_keys_that_differ() {
        let config = config();
        let state = State::new(3, &config, 11, "tokens", GuardState::default());
        state.require("c", &config, 11, "tokens", false).unwrap();
        let mut other = config.clone();
        other.model.hidden_size = 5;
        other.optimizer.learning_rate = 0.1;
        other.checkpoint.every = 77;
        let error = state.require("c", &other, 12, "more", false).unwrap_err().to_string();
        for part in
            ["model.hidden_size: 1024, 5", "optimizer.learning_rate: 0.004, 0.1", "11, 12", "more"]
        {
            assert!(error.contains(part), "{error}");
        }
        assert!(!error.contains("checkpoint.every"), "{error}");
        let error = state.require("c", &other, 11, "more", true).unwrap_err().to_string();
        assert!(error.contains("model.hidden_size") && !error.contains("learning_rate"), "{error}");
        let bytes = serde_json::to_string(&state).unwrap();
        let newer = bytes.replace("\"version\":1", "\"version\":2");
        assert!(State::read("c", newer.as_bytes()).unwrap_err().to_string().contains("version 2"));
        assert_eq!(State::read("c", bytes.as_bytes()).unwrap(), state);
    }
}
