//! The loop of a training run.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

mod corpus;
mod data_parallel;
mod guard;
mod memory;
mod prepare;
mod resume;

pub use corpus::Corpus;
pub use data_parallel::{DataParallel, Plan};
pub use memory::plan_memory;
use mmfree::benchmark::peak_rss_bytes;
pub use prepare::{PrepareObserver, Prepared, prepare};

use guard::Guard;

use crate::architecture::Architecture;
use crate::backend::Backend;
use crate::checkpoint::{Checkpoints, GuardState};
use crate::communicator::Communicator;
use crate::config::TrainConfig;
use crate::error::{Error, Result};
use crate::log::{Record, RunLog};
use crate::outcome;
use crate::schedule::Schedule;
use crate::weights;

/// How a run begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// Go on from the newest checkpoint, if there is one.
    pub resume: bool,
    /// Go on although keys that decide the course of training differ from the checkpoint's.
    pub allow_changes: bool,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// It was asked to stop, and has saved a checkpoint.
    Stopped,
}

/// What happens in a run, for a progress display. Only process 0 reports.
pub trait Observer {
    /// Something worth a line.
    fn note(&mut self, message: &str);
    /// A step is done.
    fn step(&mut self, record: &Record);
    /// A checkpoint was written.
    fn saved(&mut self, step: u64, path: &Path);
}

/// A training run.
pub struct Trainer<B: Backend> {
    config: TrainConfig,
    architecture: Architecture,
    corpus: Corpus,
    engine: DataParallel<B>,
    schedule: Schedule,
    guard: Guard,
    /// Steps submitted.
    step: u64,
    /// Steps done, whose outcome is known.
    done: u64,
    /// What only process 0 has.
    files: Option<RunFiles>,
    /// Step of the newest checkpoint.
    saved: Option<u64>,
}

/// Since the last record, or the beginning.
struct Pace {
    clock: Instant,
    tokens: u64,
}

/// The directory of a run, which one process writes.
struct RunFiles {
    checkpoints: Checkpoints,
    log: RunLog,
    /// Held as long as the run: another run in the same directory is refused.
    _lock: File,
}

impl<B: Backend + 'static> Trainer<B> {
    /// Sets up a run: initial weights, or those of the newest checkpoint.
    ///
    /// # Errors
    /// Everything that [`Error`] has but divergence.
    pub fn new(
        config: TrainConfig,
        corpus: Corpus,
        backend: B,
        communicator: Box<dyn Communicator<B::Flat>>,
        start: Start,
        observer: &mut dyn Observer,
    ) -> Result<Self> {
        let architecture = corpus.architecture(&config)?;
        let leads = communicator.rank() == 0;
        let opened = if leads { Some(open_directory(&config)?) } else { None };
        let layout = architecture.layout();
        let parameters = initial_weights(&config, &architecture)?;
        let mut engine =
            DataParallel::new(backend, communicator, &architecture, &config, &parameters)?;
        drop(parameters);
        if leads {
            describe(&config, &architecture, &corpus, &mut engine, observer);
        }
        let schedule = Schedule::new(&config);
        let checkpoint = match &opened {
            Some((checkpoints, _)) => find_checkpoint(checkpoints, &config, start, observer)?,
            None => None,
        };
        let state = resume::load(
            checkpoint.as_ref(),
            &config,
            &architecture,
            &corpus,
            &mut engine,
            start.allow_changes,
            layout.len(),
        )?;
        let (step, guard_state) = state.unwrap_or((0, GuardState::default()));
        let files = match opened {
            None => None,
            Some((checkpoints, lock)) => {
                let log = RunLog::open(config.directory(), step)?;
                Some(RunFiles { checkpoints, log, _lock: lock })
            }
        };
        if leads && step > 0 {
            observer.note(&format!("resuming after step {step} of {}", config.run.steps));
        }
        let guard = Guard::new(guard_state, config.guard.divergence);
        let saved = (step > 0).then_some(step);
        Ok(Self {
            config,
            architecture,
            corpus,
            engine,
            schedule,
            guard,
            step,
            done: step,
            files,
            saved,
        })
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.done
    }

    /// Trains until all steps are done or `stop` is set on any process. Saves a checkpoint in both
    /// cases.
    ///
    /// A step's loss and norm are known when it is done, on a device only after the next one was submitted. Records, the
    /// guard's word and errors come as late; what needs the weights of a step waits for it.
    ///
    /// # Errors
    /// A loss that is no number or diverges; errors of the data, the disk, the other processes. The
    /// checkpoints that are there stay.
    pub fn run(&mut self, stop: &AtomicBool, observer: &mut dyn Observer) -> Result<Outcome> {
        let mut pace = Pace { clock: Instant::now(), tokens: 0 };
        while self.step < self.config.run.steps {
            self.submit_step()?;
            let last = self.step == self.config.run.steps;
            let stopping = self.engine.any(u8::from(stop.load(Ordering::Relaxed)))? != 0;
            let evaluates = self.is_due(self.config.evaluation.every, self.step);
            let saves = self.is_due(self.config.checkpoint.every, self.step) || last || stopping;
            while let Some(outcome) = self.engine.next_outcome(evaluates || saves)? {
                self.done += 1;
                self.guard
                    .check(self.done, outcome.loss, outcome.norm)
                    .map_err(|error| self.with_last_checkpoint(error))?;
                let newest = self.done == self.step;
                let validation_loss = if newest && evaluates { self.evaluate()? } else { None };
                self.report(outcome, validation_loss, &mut pace, observer)?;
            }
            if saves {
                let saving = Instant::now();
                self.save(observer)?;
                pace.clock += saving.elapsed();
            }
            if stopping && !last {
                return Ok(Outcome::Stopped);
            }
        }
        if self.saved.is_none_or(|saved| saved < self.step) {
            self.save(observer)?;
        }
        Ok(Outcome::Finished)
    }

    /// Whether something that is done every so many steps, and after the last, is done after step `step`.
    fn is_due(&self, every: u64, step: u64) -> bool {
        every > 0 && (step.is_multiple_of(every) || step == self.config.run.steps)
    }

    /// Takes leave of the other processes.
    ///
    /// # Errors
    /// One of them has failed.
    pub fn finish(&mut self) -> Result<()> {
        self.engine.communicator().barrier()?;
        self.engine.communicator().finish();
        Ok(())
    }

    /// Submits an optimiser step. Its outcome comes when it is done.
    fn submit_step(&mut self) -> Result<()> {
        let (step, loader) = (self.step, self.corpus.train());
        self.engine.accumulate(&mut |rows| Ok(loader.rows(step, rows)?))?;
        self.engine.update(step + 1, self.schedule.at(step))?;
        self.step += 1;
        Ok(())
    }

    /// Reports the newest step that is done, if that is due.
    fn report(
        &mut self,
        outcome: outcome::Outcome,
        validation_loss: Option<f64>,
        pace: &mut Pace,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let (step, tokens) = (self.done, self.config.tokens_per_step());
        pace.tokens += tokens;
        if !self.is_due(self.config.log.every, step) && validation_loss.is_none() {
            return Ok(());
        }
        let record = Record {
            step,
            tokens: step * tokens,
            loss: Some(outcome.loss),
            validation_loss,
            learning_rate: Some(self.schedule.at(step - 1).learning_rate),
            gradient_norm: Some(outcome.norm),
            tokens_per_second: Some(pace.tokens as f64 / pace.clock.elapsed().as_secs_f64()),
            memory_bytes: peak_rss_bytes(),
            ..Record::default()
        };
        if let Some(files) = &mut self.files {
            files.log.write(&record)?;
            observer.step(&record);
        }
        *pace = Pace { clock: Instant::now(), tokens: 0 };
        Ok(())
    }

    /// Mean loss on what is held out, if anything is.
    fn evaluate(&mut self) -> Result<Option<f64>> {
        let batches = self.corpus.evaluation_batches();
        if batches == 0 {
            return Ok(None);
        }
        let corpus = &self.corpus;
        self.engine.evaluate(batches, &mut |index| corpus.evaluation_batch(index)).map(Some)
    }

    /// Writes a checkpoint, removes old ones, and points `model` at the new one.
    fn save(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let path = resume::save(
            self.files.as_mut().map(|files| (&files.checkpoints, &mut files.log)),
            self.step,
            &self.config,
            &self.architecture,
            &self.corpus,
            &mut self.engine,
            self.guard.state,
        )
        .map_err(|error| self.with_last_checkpoint(error))?;
        self.saved = Some(self.step);
        if let (Some(path), Some(files)) = (path, &self.files) {
            point_model_at(self.config.directory(), &path)?;
            files.checkpoints.prune(self.config.checkpoint.keep)?;
            observer.saved(self.step, &path);
        }
        Ok(())
    }

    /// Adds to an error what is not lost.
    fn with_last_checkpoint(&self, error: Error) -> Error {
        let kept = match (&self.files, self.saved) {
            (Some(files), Some(step)) => {
                format!("the checkpoint {} is whole", files.checkpoints.path(step).display())
            }
            _ => "there is no checkpoint yet".to_owned(),
        };
        match error {
            Error::Diverged(what) => Error::Diverged(format!("{what}; {kept}")),
            Error::Model(mmfree::error::Error::Write { file, reason }) => Error::Invalid(format!(
                "cannot write {file}: {reason}; {kept}: make room and go on with --resume"
            )),
            other => other,
        }
    }
}

/// Opens the directory of a run for this process alone.
fn open_directory(config: &TrainConfig) -> Result<(Checkpoints, File)> {
    let directory = config.directory();
    let error = |reason| Error::Write { file: directory.display().to_string(), reason };
    fs::create_dir_all(directory).map_err(error)?;
    let lock = File::create(directory.join(".lock")).map_err(error)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => {
            return Err(Error::Invalid(format!(
                "another process trains in {}: wait for it, or choose another run.directory",
                directory.display()
            )));
        }
        // A file system without locks.
        Err(fs::TryLockError::Error(_)) => {}
    }
    Ok((Checkpoints::open(directory)?, lock))
}

/// The checkpoint to go on from.
fn find_checkpoint(
    checkpoints: &Checkpoints,
    config: &TrainConfig,
    start: Start,
    observer: &mut dyn Observer,
) -> Result<Option<crate::checkpoint::Checkpoint>> {
    if !start.resume {
        return match checkpoints.steps()?.last() {
            None => Ok(None),
            Some(step) => Err(Error::Invalid(format!(
                "{} has a checkpoint of step {step}: go on from it with --resume, or choose another \
                 run.directory",
                config.run.directory
            ))),
        };
    }
    let (newest, damaged) = checkpoints.newest()?;
    for message in damaged {
        observer.note(&format!("passed over: {message}"));
    }
    if newest.is_none() {
        observer.note("there is no checkpoint yet: beginning at step 0");
    }
    Ok(newest)
}

/// Weights before the first step.
fn initial_weights(config: &TrainConfig, architecture: &Architecture) -> Result<Vec<f32>> {
    let source = &config.model.initial_checkpoint;
    if source.is_empty() {
        let range = config.model.initializer_range as f32;
        return Ok(architecture.layout().initialize(config.run.seed, range));
    }
    let (found, parameters) = weights::load(Path::new(source))?;
    let differences = found.differences(architecture);
    if differences.is_empty() {
        return Ok(parameters);
    }
    Err(Error::OtherConfiguration {
        checkpoint: format!("model.initial_checkpoint = {source:?}"),
        differences,
        hint: "\nMake [model] and the tokenizer agree with it, or name another checkpoint",
    })
}

/// The header of a run.
fn describe<B: Backend + 'static>(
    config: &TrainConfig,
    architecture: &Architecture,
    corpus: &Corpus,
    engine: &mut DataParallel<B>,
    observer: &mut dyn Observer,
) {
    observer.note(&format!(
        "model: {} with {:.1} million parameters, V={}",
        architecture.model_type(),
        engine.len() as f64 / 1e6,
        architecture.vocab_size()
    ));
    let loader = corpus.train();
    observer.note(&format!(
        "data: {} tokens, {} held-out sequences; {} tokens a step, {:.2} epochs in all",
        loader.tokens(),
        corpus.evaluation_batches() * config.batch.micro_batch,
        config.tokens_per_step(),
        (config.run.steps * config.batch.sequences as u64) as f64 / loader.sequences() as f64
    ));
    let computes = engine.describe();
    observer.note(&format!("computing: {computes}, {}", engine.communicator().describe()));
    if !engine.plan().exact {
        observer.note(
            "this number of processes adds gradients in another order than one process does: losses differ \
             by rounding (powers of two up to batch.reduction_groups do not)",
        );
    }
}

/// Makes `model` in the run's directory a link to a checkpoint.
fn point_model_at(directory: &Path, checkpoint: &Path) -> Result<()> {
    let (link, beside) = (directory.join("model"), directory.join(".mmfree-model"));
    let name = checkpoint.file_name().unwrap_or_default();
    let target: PathBuf = Path::new("checkpoints").join(name);
    let make = || {
        let _ = fs::remove_file(&beside);
        std::os::unix::fs::symlink(&target, &beside)?;
        fs::rename(&beside, &link)
    };
    make().map_err(|reason| Error::Write { file: link.display().to_string(), reason })
}
