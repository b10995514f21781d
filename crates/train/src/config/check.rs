//! What contradicts what.

use super::parse::{Line, Parsed, Problem};
use super::{Architecture, ScheduleKind, TrainConfig};

/// Largest configuration of a model that sizes are multiplied for without overflow.
const MAX_HIDDEN_SIZE: usize = 1 << 16;
const MAX_INTERMEDIATE_SIZE: usize = 1 << 18;
const MAX_LAYERS: usize = 1 << 10;
const MAX_VOCAB_SIZE: usize = 1 << 22;
const MAX_SEQUENCE_LENGTH: usize = 1 << 24;
const MAX_SEQUENCES: usize = 1 << 24;

/// Everything that cannot be, or cannot be together, among the values that were understood.
pub(super) fn contradictions(parsed: &Parsed) -> Vec<Problem> {
    let config = &parsed.config;
    let mut check = Check { parsed, problems: Vec::new() };
    check.ranges(config);
    check.architecture(config);
    check.batch(config);
    check.schedule(config);
    check.data(config);
    check.problems
}

struct Check<'a> {
    parsed: &'a Parsed,
    problems: Vec<Problem>,
}

impl Check<'_> {
    /// Refuses if something does not hold that follows from these keys. The place is that of the last of them that
    /// was given.
    fn require(&mut self, holds: bool, keys: &[&str], what: impl FnOnce() -> String) {
        if holds || keys.iter().any(|key| self.parsed.is_uncertain(key)) {
            return;
        }
        let given = keys.iter().filter_map(|key| self.parsed.places.get(key).copied());
        let line = given.max().unwrap_or(Line::File);
        self.problems.push(Problem { line, what: what() });
    }

    fn given(&self, key: &str) -> bool {
        self.parsed.places.contains_key(key)
    }

    fn ranges(&mut self, config: &TrainConfig) {
        let (model, batch, optimizer) = (&config.model, &config.batch, &config.optimizer);
        for (key, value, min, max) in [
            ("model.vocab_size", model.vocab_size, 0, MAX_VOCAB_SIZE),
            ("model.hidden_size", model.hidden_size, 1, MAX_HIDDEN_SIZE),
            ("model.intermediate_size", model.intermediate_size, 0, MAX_INTERMEDIATE_SIZE),
            ("model.num_hidden_layers", model.num_hidden_layers, 1, MAX_LAYERS),
            ("batch.sequence_length", batch.sequence_length, 1, MAX_SEQUENCE_LENGTH),
            ("batch.sequences", batch.sequences, 1, MAX_SEQUENCES),
            ("batch.micro_batch", batch.micro_batch, 1, MAX_SEQUENCES),
            ("batch.reduction_groups", batch.reduction_groups, 1, 1 << 16),
            ("checkpoint.keep", config.checkpoint.keep, 1, 1 << 20),
            ("data.tokenizer_vocab_size", config.data.tokenizer_vocab_size, 257, MAX_VOCAB_SIZE),
            ("log.every", config.log.every as usize, 1, usize::MAX),
            ("run.steps", config.run.steps as usize, 1, 1 << 40),
            ("run.threads", config.run.threads, 0, 1 << 12),
        ] {
            self.require((min..=max).contains(&value), &[key], || {
                format!("{key} is {value}, expected {min} to {max}")
            });
        }
        let schedule = &config.schedule;
        for (key, value, min, max) in [
            ("optimizer.learning_rate", optimizer.learning_rate, 0.0, 10.0),
            ("optimizer.eps", optimizer.eps, 0.0, 1.0),
            ("optimizer.weight_decay", optimizer.weight_decay, 0.0, 1.0),
            ("optimizer.weight_decay_embeddings", optimizer.weight_decay_embeddings, 0.0, 1.0),
            ("optimizer.weight_decay_norms", optimizer.weight_decay_norms, 0.0, 1.0),
            ("optimizer.clip_grad_norm", optimizer.clip_grad_norm, 0.0, f64::MAX),
            ("schedule.final_fraction", schedule.final_fraction, 0.0, 1.0),
            ("schedule.second_stage_at", schedule.second_stage_at, 0.0, 1.0),
            ("schedule.second_stage_learning_rate", schedule.second_stage_learning_rate, 0.0, 10.0),
            ("schedule.second_stage_weight_decay", schedule.second_stage_weight_decay, 0.0, 10.0),
            ("guard.divergence", config.guard.divergence, 0.0, f64::MAX),
            ("model.initializer_range", model.initializer_range, 0.0, 10.0),
        ] {
            self.require((min..=max).contains(&value), &[key], || {
                format!("{key} is {value}, expected {min} to {max}")
            });
        }
        for (key, value) in
            [("optimizer.beta1", optimizer.beta1), ("optimizer.beta2", optimizer.beta2)]
        {
            self.require((0.0..1.0).contains(&value), &[key], || {
                format!("{key} is {value}, expected at least 0 and less than 1")
            });
        }
        for (key, value, limit) in [
            ("model.rms_norm_eps", model.rms_norm_eps, 1.0),
            ("model.rope_theta", model.rope_theta, 1e12),
            ("optimizer.learning_rate", optimizer.learning_rate, f64::MAX),
        ] {
            self.require(value > 0.0 && value < limit, &[key], || {
                format!("{key} is {value}, expected a positive number below {limit}")
            });
        }
        self.require(
            config.data.validation_fraction >= 0.0 && config.data.validation_fraction < 1.0,
            &["data.validation_fraction"],
            || {
                format!(
                    "data.validation_fraction is {}, expected at least 0 and less than 1",
                    config.data.validation_fraction
                )
            },
        );
        self.require(!config.run.directory.is_empty(), &["run.directory"], || {
            "run.directory is empty, expected a directory".to_owned()
        });
    }

    fn architecture(&mut self, config: &TrainConfig) {
        let model = &config.model;
        let heads = "model.num_attention_heads";
        match model.architecture {
            Architecture::MatmulFree => {
                self.require(model.num_attention_heads == 0, &[heads, "model.architecture"], || {
                    format!(
                        "{heads} belongs to transformer++: the MatMul-free model has no attention"
                    )
                });
                let theta = model.rope_theta == super::ModelSection::default().rope_theta;
                self.require(theta, &["model.rope_theta", "model.architecture"], || {
                    "model.rope_theta belongs to transformer++: the MatMul-free model has no position \
                     embedding"
                        .to_owned()
                });
            }
            Architecture::TransformerPlusPlus => {
                let count = model.num_attention_heads;
                let fits = count > 0
                    && model.hidden_size.is_multiple_of(count)
                    && (model.hidden_size / count).is_multiple_of(2);
                self.require(fits, &[heads, "model.hidden_size", "model.architecture"], || {
                    format!(
                        "{heads} is {count}, which does not divide model.hidden_size = {} into heads of \
                         an even size",
                        model.hidden_size
                    )
                });
                let bound = self.given("model.use_lower_bound") && model.use_lower_bound;
                self.require(!bound, &["model.use_lower_bound", "model.architecture"], || {
                    "model.use_lower_bound = true belongs to matmul-free: transformer++ has no forget \
                     gates"
                        .to_owned()
                });
            }
        }
    }

    fn batch(&mut self, config: &TrainConfig) {
        let batch = &config.batch;
        let divides = batch.micro_batch > 0 && batch.sequences.is_multiple_of(batch.micro_batch);
        self.require(divides, &["batch.micro_batch", "batch.sequences"], || {
            format!(
                "batch.micro_batch is {}, which does not divide batch.sequences = {}",
                batch.micro_batch, batch.sequences
            )
        });
        self.require(batch.reduction_groups.is_power_of_two(), &["batch.reduction_groups"], || {
            format!("batch.reduction_groups is {}, expected a power of two", batch.reduction_groups)
        });
    }

    fn schedule(&mut self, config: &TrainConfig) {
        let schedule = &config.schedule;
        self.require(
            schedule.warmup_steps <= config.run.steps,
            &["schedule.warmup_steps", "run.steps"],
            || {
                format!(
                    "schedule.warmup_steps is {}, more than run.steps = {}",
                    schedule.warmup_steps, config.run.steps
                )
            },
        );
        let plain = super::ScheduleConfig::default();
        if schedule.kind != ScheduleKind::TwoStage {
            for (key, differs) in [
                ("schedule.second_stage_at", schedule.second_stage_at != plain.second_stage_at),
                (
                    "schedule.second_stage_learning_rate",
                    schedule.second_stage_learning_rate != plain.second_stage_learning_rate,
                ),
                (
                    "schedule.second_stage_weight_decay",
                    schedule.second_stage_weight_decay != plain.second_stage_weight_decay,
                ),
            ] {
                self.require(!differs, &[key, "schedule.kind"], || {
                    format!("{key} belongs to schedule.kind = \"two-stage\"")
                });
            }
        }
        let falls = schedule.kind != ScheduleKind::Constant || schedule.final_fraction == 0.0;
        self.require(falls, &["schedule.final_fraction", "schedule.kind"], || {
            "schedule.final_fraction has no meaning with schedule.kind = \"constant\"".to_owned()
        });
    }

    fn data(&mut self, config: &TrainConfig) {
        let data = &config.data;
        self.require(!data.train.is_empty(), &["data.train"], || {
            "data.train is empty: name texts (.txt, .jsonl, .jsonl.zst, .parquet), folders of them, or \
             a folder of token shards"
                .to_owned()
        });
        let held_out = !data.validation.is_empty() || data.validation_fraction > 0.0;
        self.require(
            held_out || config.evaluation.every == 0,
            &["evaluation.every", "data.validation", "data.validation_fraction"],
            || {
                "evaluation.every is above 0, but nothing is held out: give data.validation or a \
                 data.validation_fraction above 0"
                    .to_owned()
            },
        );
        let repeated = data.train.iter().find(|path| data.validation.contains(path));
        self.require(repeated.is_none(), &["data.train", "data.validation"], || {
            format!(
                "{} is in data.train and in data.validation: held-out text must not be trained on",
                repeated.map_or("", String::as_str)
            )
        });
    }
}
