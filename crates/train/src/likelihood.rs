//! Log-likelihoods of continuations by the Transformer++, with the forward pass of training, in full precision.

use mmfree::error::Result;
use mmfree::eval::request::Request;
use mmfree::eval::scorer::{Score, Scorer, Tick};

use crate::architecture::Architecture;
use crate::backend::{Backend, BatchShape, IGNORED};
use crate::model::{Batch, Model, ModelOptions};

/// Tokens of a batch, about.
const BATCH_TOKENS: usize = 2048;
/// Sequences are padded to a multiple of this.
const LENGTH_STEP: usize = 16;

/// Scores with a model of full-precision weights that reads whole sequences.
pub struct FullPrecisionScorer<B: Backend> {
    backend: B,
    architecture: Architecture,
    parameters: B::Flat,
    window: usize,
}

impl<B: Backend + 'static> FullPrecisionScorer<B> {
    /// A scorer for parameters in the order of the architecture's layout. `window` is the most tokens that the
    /// model reads.
    ///
    /// # Errors
    /// No memory.
    pub fn new(
        mut backend: B,
        architecture: Architecture,
        parameters: &[f32],
        window: usize,
    ) -> Result<Self> {
        let parameters = backend.flat_from(parameters)?;
        Ok(Self { backend, architecture, parameters, window: window.max(1) })
    }

    fn model(&mut self, shape: BatchShape) -> Result<Model<B>> {
        let options = ModelOptions { recompute: true, ..ModelOptions::default() };
        let mut model = Model::new(&mut self.backend, &self.architecture, shape, &options)?;
        model.update_weights(&mut self.backend, &self.parameters)?;
        Ok(model)
    }
}

impl<B: Backend + 'static> Scorer for FullPrecisionScorer<B> {
    fn describe(&self) -> String {
        self.backend.describe()
    }

    fn vocab_size(&self) -> usize {
        self.architecture.vocab_size()
    }

    fn window(&self) -> Option<usize> {
        Some(self.window)
    }

    /// Sequences of about one length share a batch; what is behind a sequence's end cannot be seen by it.
    fn score(&mut self, groups: &[Vec<Request>], tick: &mut Tick<'_>) -> Result<Vec<Vec<Score>>> {
        let mut scores: Vec<Vec<Score>> =
            groups.iter().map(|group| vec![Score::NOTHING; group.len()]).collect();
        let mut order: Vec<(usize, usize)> = groups
            .iter()
            .enumerate()
            .flat_map(|(group, requests)| (0..requests.len()).map(move |request| (group, request)))
            .collect();
        let length = |&(group, request): &(usize, usize)| groups[group][request].tokens.len() - 1;
        // The longest first: a lack of memory shows at once.
        order.sort_by_key(|at| std::cmp::Reverse(length(at)));
        let (mut first, mut model) = (0, None::<Model<B>>);
        while first < order.len() {
            tick(first)?;
            let padded = length(&order[first]).next_multiple_of(LENGTH_STEP);
            let sequences = (BATCH_TOKENS / padded).clamp(1, order.len());
            let shape = BatchShape { sequences, length: padded };
            // The memory of one shape goes before that of the next comes.
            drop(model.take_if(|model| model.shape() != shape));
            let model = match &mut model {
                Some(model) => model,
                none => none.insert(self.model(shape)?),
            };
            let part = &order[first..order.len().min(first + sequences)];
            let (mut ids, mut targets) = (vec![0; shape.tokens()], vec![IGNORED; shape.tokens()]);
            let rows = ids.chunks_exact_mut(padded).zip(targets.chunks_exact_mut(padded));
            for ((ids, targets), &(group, request)) in rows.zip(part) {
                let Request { tokens, context } = &groups[group][request];
                let last = tokens.len() - 1;
                ids[..last].copy_from_slice(&tokens[..last]);
                targets[context - 1..last].copy_from_slice(&tokens[*context..]);
            }
            let batch = Batch { ids: &ids, targets: &targets };
            let found = model.token_scores(&mut self.backend, &self.parameters, batch)?;
            let mut found = found.into_iter();
            for &(group, request) in part {
                let Request { tokens, context } = &groups[group][request];
                found
                    .by_ref()
                    .take(tokens.len() - context)
                    .for_each(|token| scores[group][request].add(token));
            }
            first += part.len();
        }
        tick(order.len())?;
        Ok(scores)
    }

    fn roll(&mut self, _: &[u32]) -> Result<Option<Score>> {
        Ok(None)
    }

    fn restart(&mut self, _: u32) {}
}
