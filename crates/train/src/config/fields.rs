//! The table of configuration keys.

use std::borrow::Cow;

use toml::de::DeValue;

use super::TrainConfig;
use super::value::Setting;

/// What a key decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The model: a checkpoint of another one cannot be continued at all.
    Model,
    /// The course of training: a checkpoint made with another value would go on otherwise.
    Course,
    /// How the run is conducted: may change between a checkpoint and its continuation.
    Conduct,
}

/// A configuration key.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// `section.key`
    pub path: &'static str,
    /// What it decides.
    pub scope: Scope,
    /// Reads a value into its place; what was expected, if it does not fit.
    pub(super) set: fn(&mut TrainConfig, &DeValue) -> Result<(), Cow<'static, str>>,
    /// Its value as TOML.
    pub(super) show: fn(&TrainConfig) -> String,
}

impl Field {
    /// Its value in a configuration, as TOML.
    pub fn show(&self, config: &TrainConfig) -> String {
        (self.show)(config)
    }
}

macro_rules! table {
    ($($scope:ident $section:ident.$key:ident;)+) => {
        &[$(Field {
            path: concat!(stringify!($section), ".", stringify!($key)),
            scope: Scope::$scope,
            set: |config, value| {
                config.$section.$key = Setting::read(value)?;
                Ok(())
            },
            show: |config| config.$section.$key.show(),
        }),+]
    };
}

/// Every key, in the order in which they are written.
pub fn fields() -> &'static [Field] {
    table! {
        Conduct run.directory;
        Course run.steps;
        Course run.seed;
        Conduct run.threads;
        Conduct data.train;
        Conduct data.validation;
        Course data.validation_fraction;
        Conduct data.tokenizer;
        Course data.tokenizer_vocab_size;
        Course data.text_field;
        Course data.separator;
        Conduct data.cache;
        Model model.architecture;
        Model model.vocab_size;
        Model model.hidden_size;
        Model model.intermediate_size;
        Model model.num_hidden_layers;
        Model model.num_attention_heads;
        Model model.rms_norm_eps;
        Model model.use_lower_bound;
        Model model.rope_theta;
        Course model.initializer_range;
        Conduct model.initial_checkpoint;
        Course batch.sequence_length;
        Course batch.sequences;
        Course batch.micro_batch;
        Course batch.reduction_groups;
        Conduct batch.recompute_activations;
        Conduct batch.recompute_gates;
        Course optimizer.learning_rate;
        Course optimizer.beta1;
        Course optimizer.beta2;
        Course optimizer.eps;
        Course optimizer.weight_decay;
        Course optimizer.weight_decay_embeddings;
        Course optimizer.weight_decay_norms;
        Course optimizer.clip_grad_norm;
        Course schedule.kind;
        Course schedule.warmup_steps;
        Course schedule.final_fraction;
        Course schedule.second_stage_at;
        Course schedule.second_stage_learning_rate;
        Course schedule.second_stage_weight_decay;
        Conduct evaluation.every;
        Conduct evaluation.sequences;
        Conduct checkpoint.every;
        Conduct checkpoint.keep;
        Conduct log.every;
        Conduct log.tensorboard;
        Conduct guard.divergence;
    }
}
