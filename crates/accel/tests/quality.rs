//! The built-in model on the simulated accelerator beside the float engine.

use std::sync::Arc;
use std::time::Instant;

use mmfree::builtin;
use mmfree::engine::{Engine, EngineOptions};
use mmfree::model::Model;
use mmfree::state::State;
use mmfree_accel::compiler::Plan;
use mmfree_accel::config::{Configuration, Packing};
use mmfree_accel::machine::Machine;

#[test]
fn speed_probe() {
    let checkpoint = builtin::checkpoint().unwrap();
    let configuration = Configuration::preset("sim").unwrap();
    let plan = Plan::new(checkpoint.config(), &configuration, Packing::T5).unwrap();
    println!("{}", mmfree_accel::asm::listing(&plan.program));
    println!("{:?}", plan.data_map);
    let start = Instant::now();
    let image = plan.image(&checkpoint, &mut |_, _| {}).unwrap();
    println!("compile {:?}", start.elapsed());
    let mut machine = Machine::new(image);
    let mut engine = Engine::new(Arc::new(Model::load(&checkpoint).unwrap()), &EngineOptions::default()).unwrap();
    let mut state = State::new(&engine.model().clone());
    let start = Instant::now();
    let mut token = 1;
    for _ in 0..40 {
        let next = machine.run(token).unwrap();
        let logits = engine.decode(&mut state, token).unwrap();
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        let ours = mmfree_accel::generate::logits(&machine);
        let rms = (ours.iter().zip(logits.iter()).map(|(a, b)| f64::from((a - b) * (a - b))).sum::<f64>() / ours.len() as f64).sqrt();
        println!("{token} -> {next} engine {best}  rms {rms}");
        token = next;
    }
    println!("{:?} a token", start.elapsed() / 40);
}
