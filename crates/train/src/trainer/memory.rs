//! Whether a run fits on a GPU, before anything is allocated, and what would fit if it does not.

use super::data_parallel;
use crate::architecture::Architecture;
use crate::backend::CudaPlan;
use crate::config::TrainConfig;
use crate::error::{Error, Result};

/// What the driver and the libraries take of the device beside buffers: kernels are loaded at first use.
const DRIVER_BYTES: usize = 256 << 20;

/// What [`DataParallel::new`](super::DataParallel::new) allocates on a GPU, as process `rank` of `world`, with logits of
/// `head_chunk` tokens at a time.
///
/// # Errors
/// More processes than micro-batches, an empty batch.
pub fn plan_memory(
    architecture: &Architecture,
    config: &TrainConfig,
    head_chunk: usize,
    rank: usize,
    world: usize,
) -> Result<CudaPlan> {
    let mut plan = CudaPlan::default();
    data_parallel::plan(&mut plan, architecture, config, head_chunk, rank, world)?;
    Ok(plan)
}

/// Requires that a run fits into `free` of `total` bytes.
///
/// # Errors
/// [`Error::Invalid`] with what is needed, what is free and which settings would fit.
pub(super) fn require(
    free: usize,
    total: usize,
    architecture: &Architecture,
    config: &TrainConfig,
    head_chunk: usize,
    rank: usize,
    world: usize,
) -> Result<()> {
    let plan = |config: &TrainConfig| -> Result<CudaPlan> {
        let mut plan = plan_memory(architecture, config, head_chunk, rank, world)?;
        plan.scratch += DRIVER_BYTES;
        Ok(plan)
    };
    let needed = plan(config)?;
    if needed.bytes() <= free {
        return Ok(());
    }
    let fits = |config: &TrainConfig| plan(config).is_ok_and(|plan| plan.bytes() <= free);
    let settings = what_fits(architecture, config, &fits);
    let advice = if settings.is_empty() {
        "no setting makes this model fit: use a larger GPU or more processes".to_owned()
    } else {
        format!("what would fit: {}", settings.join("; or "))
    };
    let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
    Err(Error::Invalid(format!(
        "training takes {:.2} GiB of GPU memory (weights, gradients and moments {:.2}, activations {:.2}, scratch \
         {:.2}), and {:.2} of {:.2} GiB are free; {advice}",
        gib(needed.bytes()),
        gib(needed.weights),
        gib(needed.activations),
        gib(needed.scratch),
        gib(free),
        gib(total)
    )))
}

/// Settings that fit, cheapest in arithmetic first: each changes as little as possible of one key, the last ones of two.
fn what_fits(
    architecture: &Architecture,
    config: &TrainConfig,
    fits: &dyn Fn(&TrainConfig) -> bool,
) -> Vec<String> {
    let mut found = Vec::new();
    let changed = |change: &dyn Fn(&mut TrainConfig)| {
        let mut config = config.clone();
        change(&mut config);
        config
    };
    let sequences = config.batch.sequences;
    let smaller: Vec<usize> = (1..config.batch.micro_batch)
        .rev()
        .filter(|&micro_batch| sequences.is_multiple_of(micro_batch))
        .collect();
    let largest = |recompute: bool| {
        smaller.iter().copied().find(|&micro_batch| {
            fits(&changed(&|config| {
                config.batch.micro_batch = micro_batch;
                config.batch.recompute_activations |= recompute;
            }))
        })
    };
    if config.batch.reduction_groups > 1
        && fits(&changed(&|config| config.batch.reduction_groups = 1))
    {
        found.push("batch.reduction_groups = 1".to_owned());
    }
    found.extend(largest(false).map(|size| format!("batch.micro_batch = {size}")));
    if config.batch.recompute_activations {
        return found;
    }
    if matches!(architecture, Architecture::MatMulFree(_)) {
        let blocks = (config.batch.recompute_gates + 1..=architecture.layers())
            .find(|&blocks| fits(&changed(&|config| config.batch.recompute_gates = blocks)));
        found.extend(blocks.map(|blocks| format!("batch.recompute_gates = {blocks}")));
    }
    let recompute = "batch.recompute_activations = true";
    if fits(&changed(&|config| config.batch.recompute_activations = true)) {
        found.push(recompute.to_owned());
    } else if found.is_empty() {
        let size = largest(true);
        found.extend(size.map(|size| format!("batch.micro_batch = {size} with {recompute}")));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::benchmark;

    const CHUNK: usize = 4096;
    const TOTAL: usize = 80 << 30;

    fn config(batch: usize) -> TrainConfig {
        let mut config = TrainConfig::default();
        config.batch.sequences = batch;
        config.batch.micro_batch = batch;
        config.batch.sequence_length = 2048;
        config.batch.reduction_groups = 1;
        config
    }

    fn plan(architecture: &Architecture, config: &TrainConfig, world: usize) -> CudaPlan {
        plan_memory(architecture, config, CHUNK, 0, world).unwrap()
    }

    #[test]
    fn the_plan_is_what_the_model_keeps() {
        let architecture = benchmark::architecture("370m", false).unwrap();
        let (layout, layers) = (architecture.layout(), architecture.layers());
        let (config, tokens) = (config(28), 28 * 2048);
        let found = plan(&architecture, &config, 1);
        // 16 bytes a parameter, and 3 more in the weights that products take: bf16, and bytes.
        let len = layout.len();
        let matrices = layout.matrix_weights();
        assert!(
            (16 * len + 3 * matrices..16 * len + 3 * matrices + (1 << 20)).contains(&found.weights)
        );
        // 12 D + 4 F + 16 bytes a token and layer, and the tensors of one block.
        let (d, f) = (1024, 2816);
        let kept = (12 * d + 4 * f + 16) * tokens * layers;
        assert!((kept..kept + 60 * d * tokens).contains(&found.activations), "{found:?}, {kept}");
        // Two processes share the moments; everything else both have.
        let mut two = config.clone();
        two.batch.sequences *= 2;
        let two = plan(&architecture, &two, 2);
        assert_eq!(two.activations, found.activations);
        let saved = found.weights - two.weights;
        assert!(saved.abs_diff(4 * len) <= 8 << 16, "{saved}");
    }

    #[test]
    fn what_does_not_fit_names_what_would() {
        for transformer in [false, true] {
            let architecture = benchmark::architecture("370m", transformer).unwrap();
            let mut config = config(28);
            let needed = plan(&architecture, &config, 1).bytes() + DRIVER_BYTES;
            let check = |config: &TrainConfig, free| {
                require(free, TOTAL, &architecture, config, CHUNK, 0, 1)
            };
            check(&config, needed).unwrap();
            let free = needed - needed / 10;
            let message = check(&config, free).unwrap_err().to_string();
            assert!(message.contains("batch.micro_batch = 14"), "{message}");
            assert_eq!(message.contains("batch.recompute_gates = "), !transformer, "{message}");
            // Every setting that is named fits, and the next smaller number does not.
            if let Some((_, gates)) = message.split_once("batch.recompute_gates = ") {
                let digits = gates.find(|c: char| !c.is_ascii_digit()).unwrap_or(gates.len());
                config.batch.recompute_gates = gates[..digits].parse().unwrap();
                check(&config, free).unwrap();
                config.batch.recompute_gates -= 1;
                check(&config, free).unwrap_err();
                config.batch.recompute_gates = 0;
            }
            config.batch.recompute_activations = true;
            check(&config, free).unwrap();
            let message = check(&config, 1 << 30).unwrap_err().to_string();
            assert!(message.contains("no setting"), "{message}");
        }
    }
}
