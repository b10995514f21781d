//! The model that is judged.

use std::path::Path;

use anyhow::Result;
use mmfree::checkpoint::{FullPrecision, TokenizerSource};
use mmfree::eval::scorer::{EngineScorer, Scorer};
use mmfree::tokenizer::Tokenizer;
use mmfree_train::architecture::Architecture;
use mmfree_train::likelihood::FullPrecisionScorer;
use mmfree_train::weights;

use crate::model_arg::{self, EngineArgs, FullPrecisionBackend};

/// A model that is ready to judge texts, and its tokenizer.
pub struct Judge {
    pub name: String,
    pub scorer: Box<dyn Scorer>,
    pub tokenizer: Option<Tokenizer>,
    /// First and last token of a text, as the configuration has them.
    pub bos: Option<u32>,
    pub eos: Option<u32>,
}

impl Judge {
    /// Loads a MatMul-free model or a Transformer++.
    pub fn load(model: Option<&Path>, args: &EngineArgs) -> Result<Self> {
        if let Some(model) = model.filter(|model| FullPrecision::is_transformer(model)) {
            return Self::transformer(model, args);
        }
        let checkpoint = model_arg::open(model)?;
        let name = model.map_or("built-in model".into(), |model| model.display().to_string());
        let config = checkpoint.config();
        let (bos, eos) = (config.bos_token_id, config.eos_token_ids.first().copied());
        let loaded = model_arg::load(&checkpoint, args)?;
        let scorer = Box::new(EngineScorer::new(loaded.engine));
        Ok(Self { name, scorer, tokenizer: loaded.tokenizer, bos, eos })
    }

    fn transformer(model: &Path, args: &EngineArgs) -> Result<Self> {
        let backend = args.full_precision()?;
        let tokenizer = Tokenizer::from_source(&TokenizerSource::open(model)?)?;
        let (architecture, parameters) = weights::load(model)?;
        let (window, bos, eos) = match &architecture {
            Architecture::Transformer(config) => (
                config.max_position_embeddings,
                config.bos_token_id,
                config.eos_token_ids.first().copied(),
            ),
            Architecture::MatMulFree(config) => {
                (usize::MAX, config.bos_token_id, config.eos_token_ids.first().copied())
            }
        };
        let scorer: Box<dyn Scorer> = match backend {
            FullPrecisionBackend::Cpu(cpu) => {
                Box::new(FullPrecisionScorer::new(*cpu, architecture, &parameters, window)?)
            }
            FullPrecisionBackend::Cuda(cuda) => {
                Box::new(FullPrecisionScorer::new(*cuda, architecture, &parameters, window)?)
            }
        };
        let name = model.display().to_string();
        Ok(Self { name, scorer, tokenizer: Some(tokenizer), bos, eos })
    }
}
