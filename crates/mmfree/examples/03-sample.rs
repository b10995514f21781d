//! Lesson 3: from logits to a token, without a model.
//!
//! ```text
//! cargo run --example 03-sample
//! ```

use mmfree::error::Result;
use mmfree::sampler::{Sampler, SamplingParams};

fn main() -> Result<()> {
    // A model gives a logit for each token of its vocabulary; here there are four.
    let logits = [2.0, 1.0, 1.0, -1.0];

    // Greedy: the highest logit, always.
    let mut greedy = Sampler::new(SamplingParams::greedy())?;
    assert_eq!(greedy.sample(&mut logits.clone(), &[])?, 0);

    // A repetition penalty makes what was said recently less likely: 2.0 / 3.0 is below 1.0.
    let params = SamplingParams { repetition_penalty: 3.0, ..SamplingParams::greedy() };
    assert_eq!(Sampler::new(params)?.sample(&mut logits.clone(), &[0])?, 1);

    // Drawing by probability: the same seed gives the same tokens, on every platform.
    let params = SamplingParams { seed: 7, ..SamplingParams::default() };
    let draw = || -> Result<Vec<u32>> {
        let mut sampler = Sampler::new(params.clone())?;
        (0..10).map(|_| sampler.sample(&mut logits.clone(), &[])).collect()
    };
    println!("{:?}", draw()?);
    assert_eq!(draw()?, draw()?);

    // Top-k, top-p and min-p each leave out the unlikely tokens, by count, by sum and by ratio.
    for params in [
        SamplingParams { top_k: 3, ..params.clone() },
        SamplingParams { top_p: 0.9, ..params.clone() },
        SamplingParams { min_p: 0.1, ..params.clone() },
    ] {
        let mut sampler = Sampler::new(params)?;
        for _ in 0..100 {
            assert_ne!(sampler.sample(&mut logits.clone(), &[])?, 3);
        }
    }
    Ok(())
}

#[test]
fn the_lesson_runs() {
    main().unwrap();
}
