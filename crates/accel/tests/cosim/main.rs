//! Lock-step co-simulation: the RTL under Verilator beside the functional simulator, vector memory and registers
//! compared after every instruction, DRAM after every token, with random latency and stalls of DRAM.

use std::sync::Arc;

use mmfree::builtin;
use mmfree::checkpoint::Checkpoint;
use mmfree::engine::{Engine, EngineOptions};
use mmfree::model::Model;
use mmfree::state::State;
use mmfree_accel::arith;
use mmfree_accel::asm::{assemble, listing};
use mmfree_accel::compiler::Plan;
use mmfree_accel::config::{Configuration, Packing};
use mmfree_accel::generate;
use mmfree_accel::image::{Image, Region, Shape};
use mmfree_accel::isa::{Instruction, Opcode};
use mmfree_accel::machine::Machine;
use mmfree_accel::timing::{self, Memory};
use mmfree_accel::trace;

mod bench;
mod mutations;
mod support;
mod units;

use support::{Rtl, first_difference};

/// A small linear congruential generator: programs are the same on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// An element: mostly of the size that models have, sometimes extreme.
    fn element(&mut self) -> i32 {
        match self.below(16) {
            0 => i32::MIN,
            1 => i32::MAX,
            2 => 0,
            3 => (self.next() << 8) as i32,
            _ => self.below(16 << arith::FRACTION_BITS) as i32 - (8 << arith::FRACTION_BITS),
        }
    }
}

/// Vector memory is cut into slots; data memory holds elements to load, and room to store.
const SLOTS: u64 = 12;

/// A random program: vectors are loaded, then every opcode comes in random order and shape.
fn random_image(configuration: &Configuration, seed: u64) -> Image {
    let mut random = Random(seed);
    let lanes = u64::from(configuration.row_lanes);
    let slot_words = u64::from(configuration.vector_words) / SLOTS;
    let longest = (slot_words * lanes).min(u64::from(configuration.activation_bytes)).min(200);
    let mut program = Vec::new();
    let mut emit = |opcode, fill: &mut dyn FnMut(&mut Instruction)| {
        let mut instruction = Instruction::new(opcode);
        fill(&mut instruction);
        program.push(instruction);
    };
    let data_bytes = 1u64 << 16;
    let mut beats = 0u64;
    let slot = |index: u64| (index * slot_words) as u16;
    emit(Opcode::Stream, &mut |_| {});
    emit(Opcode::SetA, &mut |i| i.sd = 1);
    emit(Opcode::SetA, &mut |i| (i.sd, i.imm) = (2, (data_bytes / 2 / 128) as u32));
    for index in 0..SLOTS {
        let n = longest as u16;
        emit(Opcode::Load, &mut |i| (i.vd, i.sa, i.sd, i.n) = (slot(index), 1, 1, n));
    }
    // Scales of usual size for the quantiser and products.
    emit(Opcode::SetS, &mut |i| (i.sd, i.va, i.n) = (1, slot(0), random.below(longest - 1) as u16));
    let mut loops = 0;
    for _ in 0..60 {
        let n = 1 + random.below(longest) as u16;
        let mut slots = [0; 4];
        let first = random.below(SLOTS);
        for (i, slot) in slots.iter_mut().enumerate() {
            *slot = ((first + i as u64 * (1 + first % 3)) % SLOTS * slot_words) as u16;
        }
        let [d, a, b, c] = slots;
        // Sometimes in place.
        let a = if random.below(4) == 0 { d } else { a };
        let imm = random.below(1 << 20) as u32;
        match random.below(17) {
            0 => emit(Opcode::Add, &mut |i| (i.vd, i.va, i.vb, i.n) = (d, a, b, n)),
            1 => emit(Opcode::Mul, &mut |i| (i.vd, i.va, i.vb, i.n) = (d, a, b, n)),
            2 => emit(Opcode::Sigmoid, &mut |i| (i.vd, i.va, i.n) = (d, a, n)),
            3 => emit(Opcode::Silu, &mut |i| (i.vd, i.va, i.n) = (d, a, n)),
            4 => emit(Opcode::SwiGlu, &mut |i| (i.vd, i.va, i.vb, i.n) = (d, a, b, n)),
            5 => emit(Opcode::RmsNorm, &mut |i| (i.vd, i.va, i.vb, i.n, i.imm) = (d, a, b, n, imm)),
            6 => {
                emit(Opcode::Mlgru, &mut |i| (i.vd, i.va, i.vb, i.vc, i.n) = (d, slots[1], b, c, n))
            }
            7 => emit(Opcode::ArgMax, &mut |i| (i.va, i.n) = (a, n)),
            8 if imm.is_multiple_of(3) => emit(Opcode::ClearMax, &mut |_| {}),
            9 => emit(Opcode::Store, &mut |i| (i.va, i.sa, i.sd, i.n) = (a, 2, 1, n)),
            10 => {
                emit(Opcode::SetA, &mut |i| (i.sd, i.imm) = (3, imm % 100));
                emit(Opcode::Load, &mut |i| (i.vd, i.sa, i.n) = (d, 3, n));
            }
            11 => {
                let stride = imm % 4;
                emit(Opcode::Embed, &mut |i| (i.vd, i.sa, i.n, i.imm) = (d, 4, n, stride));
            }
            12 => emit(Opcode::SetS, &mut |i| {
                (i.sd, i.va, i.n) = ((imm % 16) as u8, a, (imm >> 4) as u16 % (longest - 1) as u16);
            }),
            13 if loops < 3 && random.below(2) == 0 => {
                loops += 1;
                let turns = 1 + imm % 3;
                emit(Opcode::SetO, &mut |i| i.imm = imm % 2);
                emit(Opcode::Loop, &mut |i| i.imm = turns);
                emit(Opcode::Silu, &mut |i| {
                    (i.vd, i.va, i.n, i.indexed) = (d, slots[1], 1 + n % 8, true)
                });
                emit(Opcode::AddO, &mut |i| i.imm = 1);
                emit(Opcode::End, &mut |_| {});
            }
            _ => {
                let packing = if imm.is_multiple_of(2) { Packing::T2 } else { Packing::T5 };
                let (rows, cols) = (n, 1 + (imm >> 3) as u16 % longest as u16);
                beats += configuration.beats(packing, rows.into(), cols.into()) as u64;
                let scale = (imm >> 20) as u8 % 16;
                emit(Opcode::Quant, &mut |i| (i.sd, i.va, i.sa, i.n) = (2, a, scale, cols));
                emit(Opcode::MatVec, &mut |i| {
                    (i.vd, i.sa, i.vc, i.n, i.sd) = (d, 2, cols, rows, packing.flag());
                });
            }
        }
    }
    emit(Opcode::Halt, &mut |_| {});
    program[0].imm = beats as u32;
    let data = (0..data_bytes / 8).flat_map(|_| random.element().to_le_bytes()).collect();
    let stream_bytes = beats as usize * configuration.weight_bytes as usize;
    let streams = (0..configuration.cores)
        .map(|_| (0..stream_bytes).map(|_| random.next() as u8).collect())
        .collect();
    Image {
        configuration: configuration.clone(),
        packing: Packing::T5,
        shape: Shape::default(),
        program,
        data,
        data_bytes,
        streams,
        state: Region::default(),
        logits: Region::default(),
    }
}

/// The smallest preset and its RTL; `None` without Verilator.
fn tiny_rtl() -> Option<(Configuration, Rtl)> {
    let verilator = support::verilator()?;
    let configuration = Configuration::preset("tiny").unwrap();
    let rtl = support::build(&verilator, &configuration);
    Some((configuration, rtl))
}

/// Runs an image on both; `Err` says where they part.
fn compare(
    rtl: &Rtl,
    image: &Image,
    tokens: &[u32],
    options: &[(&str, u64)],
) -> Result<(), String> {
    let mut machine = Machine::new(image.clone());
    let mut ours = String::new();
    for &token in tokens {
        trace::run(&mut machine, token, &mut ours).map_err(|error| error.to_string())?;
    }
    let outcome = rtl.run(image, tokens, options, true);
    if outcome.exit_code != 0 {
        return Err(format!("the RTL did not finish: {}", outcome.report));
    }
    match first_difference(&ours, &outcome.trace) {
        None => Ok(()),
        Some((line, ours, theirs)) => Err(format!(
            "line {line}: simulator {ours:?}, RTL {theirs:?}; program:\n{}",
            listing(&image.program)
        )),
    }
}

#[test]
fn random_programs_leave_the_same_state_after_every_instruction() {
    let Some(verilator) = support::verilator() else { return };
    let one = Configuration {
        name: "one".to_owned(),
        cores: 1,
        weight_bytes: 4,
        row_lanes: 1,
        vector_words: 1024,
        activation_bytes: 64,
        fifo_beats: 8,
        burst_beats: 4,
    };
    let wide = Configuration {
        name: "wide".to_owned(),
        cores: 3,
        weight_bytes: 16,
        row_lanes: 8,
        vector_words: 512,
        activation_bytes: 256,
        fifo_beats: 16,
        burst_beats: 8,
    };
    for configuration in [Configuration::preset("tiny").unwrap(), one, wide] {
        configuration.check().unwrap();
        let rtl = support::build(&verilator, &configuration);
        for seed in 0..12 {
            let image = random_image(&configuration, seed);
            let options = [
                ("--latency", [0, 3, 40][seed as usize % 3]),
                ("--stall", [0, 30, 70][seed as usize / 3 % 3]),
                ("--rate", [256, 100][seed as usize % 2]),
                ("--seed", seed),
            ];
            if let Err(difference) = compare(&rtl, &image, &[3, 0], &options) {
                panic!("{}, seed {seed}, {options:?}: {difference}", configuration.name);
            }
        }
    }
}

#[test]
fn a_hung_memory_ends_with_the_watchdog_and_the_state() {
    let Some((configuration, rtl)) = tiny_rtl() else { return };
    let image = random_image(&configuration, 1);
    let outcome = rtl.run(&image, &[0], &[("--hang-after", 300), ("--watchdog", 2000)], false);
    assert_eq!((outcome.exit_code, outcome.report["status"].as_str()), (3, Some("hung")));
    for field in ["pc", "instructions", "cycle", "starved_cycles"] {
        assert!(outcome.report[field].is_u64(), "{field}: {:?}", outcome.report);
    }
    println!("{}", outcome.errors);
    for words in [
        "hung at cycle",
        "counters:",
        "control: ",
        "a7 = ",
        "row-wise unit: ",
        "data port: ",
        "writeback: ",
        "core 1: ternary unit",
        "reader: ",
        "pending ",
    ] {
        assert!(outcome.errors.contains(words), "no {words:?} in {}", outcome.errors);
    }
}

#[test]
fn a_program_that_the_hardware_cannot_run_raises_its_error() {
    let Some((configuration, rtl)) = tiny_rtl() else { return };
    let mut image = random_image(&configuration, 1);
    image.program = assemble("test", "halt").unwrap();
    image.program.insert(0, Instruction::new(Opcode::End));
    let outcome = rtl.run(&image, &[0], &[], false);
    assert_eq!((outcome.exit_code, outcome.report["status"].as_str()), (3, Some("error")));
}

#[test]
fn a_memory_that_answers_with_an_error_raises_it() {
    let Some((configuration, rtl)) = tiny_rtl() else { return };
    let image = random_image(&configuration, 1);
    for clock in [300, 600] {
        let outcome = rtl.run(&image, &[0], &[("--fail-after", clock)], false);
        assert_eq!((outcome.exit_code, outcome.report["status"].as_str()), (3, Some("error")));
    }
}

#[test]
fn the_bench_refuses_damaged_images() {
    let Some((configuration, rtl)) = tiny_rtl() else { return };
    let good = random_image(&configuration, 1).to_bytes();
    let huge = [&good[..72], &u64::MAX.to_le_bytes(), &good[80..]].concat();
    let foreign = [b"FOREIGN!", &good[8..]].concat();
    for bytes in [&good[..5000], &good[..300], &good[..20], &[], &huge, &foreign] {
        assert_eq!(rtl.run_bytes(bytes), Some(2), "{} bytes", bytes.len());
    }
}

fn tiny_checkpoint() -> Checkpoint {
    Checkpoint::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny")).unwrap()
}

/// A whole model, small enough for the smallest hardware.
fn small_model(packing: Packing) -> Image {
    let checkpoint = tiny_checkpoint();
    let configuration = Configuration::preset("tiny").unwrap();
    let plan = Plan::new(checkpoint.config(), &configuration, packing).unwrap();
    plan.image(&checkpoint, &mut |_, _| {}).unwrap()
}

#[test]
fn a_small_model_runs_in_lock_step_and_writes_the_same_sixteen_tokens() {
    let Some((_, rtl)) = tiny_rtl() else { return };
    for packing in [Packing::T5, Packing::T2] {
        let image = small_model(packing);
        let mut machine = Machine::new(image.clone());
        let (mut tokens, mut next) = (Vec::new(), 5);
        for _ in 0..16 {
            tokens.push(next);
            next = machine.run(next).unwrap();
        }
        if let Err(difference) = compare(&rtl, &image, &tokens, &[("--stall", 20)]) {
            panic!("{difference}");
        }
        let generated = rtl.run(&image, &tokens[..1], &[("--generate", 16)], false);
        let mut expected = tokens[1..].to_vec();
        expected.push(next);
        assert_eq!(generated.report["results"], serde_json::json!(expected));
    }
}

/// The timing model beside the RTL's counters: random programs and a whole model, memories of different
/// latency, rate and stalls. Stalls are drawn on both sides, with different generators.
#[test]
fn the_timing_model_is_near_the_rtl() {
    let Some((configuration, rtl)) = tiny_rtl() else { return };
    let mut images: Vec<(String, Image)> =
        (0..4).map(|seed| (format!("random {seed}"), random_image(&configuration, seed))).collect();
    images.push(("small model, t5".to_owned(), small_model(Packing::T5)));
    images.push(("small model, t2".to_owned(), small_model(Packing::T2)));
    for (name, image) in &images {
        for (latency, rate, stall) in [
            (0u64, 256u64, 0u64),
            (20, 256, 0),
            (60, 64, 0),
            (20, 20, 0),
            (30, 200, 40),
            (9, 256, 70),
        ] {
            let memory = Memory {
                latency: latency as f64,
                weight_rate: rate as f64 / 256.0,
                data_rate: 1.0,
                stall: stall as f64 / 100.0,
            };
            let expected = timing::estimate(&image.program, &configuration, memory);
            let options =
                [("--latency", latency), ("--rate", rate), ("--stall", stall), ("--seed", 9)];
            let outcome = rtl.run(image, &[1], &options, false);
            let found = outcome.report["cycles"][0].as_f64().unwrap();
            let [starved, full] = ["starved_cycles", "full_cycles"]
                .map(|name| outcome.report[name].as_f64().unwrap());
            let error = expected.cycles / found - 1.0;
            println!(
                "{name}, latency {latency}, rate {rate}/256, stalls {stall} %: RTL {found}, model {:.0}, {:+.2} %; \
                 starved {starved} and {:.0}, full {full} and {:.0}",
                expected.cycles,
                error * 100.0,
                expected.starved_cycles,
                expected.full_cycles,
            );
            let limit = if stall == 0 { 0.005 } else { 0.05 };
            assert!(error.abs() < limit, "the model is off by {:.2} %", error * 100.0);
            if stall == 0 {
                for (what, model, rtl) in [
                    ("starved", expected.starved_cycles, starved),
                    ("full", expected.full_cycles, full),
                ] {
                    let error = (model - rtl).abs() / found;
                    assert!(error < 0.005, "{what}: model {model}, RTL {rtl}");
                }
            }
        }
    }
}

/// A fast memory waits for the arithmetic, and a slow one lets it wait: each side's counter shows it.
#[test]
fn counters_tell_who_waits_for_whom() {
    let Some((_, rtl)) = tiny_rtl() else { return };
    let image = small_model(Packing::T5);
    let shares = |rate| {
        let outcome = rtl.run(&image, &[1], &[("--latency", 20), ("--rate", rate)], false);
        let cycles = outcome.report["cycles"][0].as_f64().unwrap();
        ["starved_cycles", "full_cycles"]
            .map(|name| outcome.report[name].as_f64().unwrap() / cycles)
    };
    let (fast, slow) = (shares(256), shares(8));
    assert!(fast[0] < 0.02 && fast[1] > 0.3, "a fast memory: {fast:?}");
    assert!(slow[0] > 0.5 && slow[1] < 0.2, "a slow memory: {slow:?}");
}

/// Each module against the simulator's arithmetic; then with each of the faults, which must be found.
#[test]
fn units_compute_what_the_simulator_does_and_faults_are_found() {
    let Some(verilator) = support::verilator() else { return };
    let folder = tempfile::tempdir().unwrap();
    let rtl = mutations::mutated_rtl(folder.path());
    let program = support::build_units(&verilator, &rtl);
    let run = |&(name, unit, check): &units::Unit, mutation| {
        let mut random = Random(u64::from(unit) + 1);
        let mut bench = bench::Bench::start(&program, unit, mutation);
        check(&mut bench, &mut random).map_err(|what| format!("{name}: {what}"))
    };
    for unit in &units::ALL {
        run(unit, 0).unwrap();
    }
    let mut missed = Vec::new();
    for (index, mutation) in mutations::ALL.iter().enumerate() {
        if mutation.bench == mutations::PROGRAM {
            continue;
        }
        let unit = units::ALL.iter().find(|unit| unit.0 == mutation.bench).unwrap();
        match run(unit, index + 1) {
            Ok(()) => missed.push(mutation.what),
            Err(found) => println!("{}, {}: {found}", mutation.file, mutation.what),
        }
    }
    assert!(missed.is_empty(), "nobody noticed: {missed:?}");
}

/// The same faults in the whole accelerator: those that its arithmetic and its units' ends depend on.
#[test]
fn faults_are_found_by_whole_programs() {
    let Some(verilator) = support::verilator() else { return };
    let configuration = Configuration::preset("tiny").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let rtl_folder = mutations::mutated_rtl(folder.path());
    let rtl = support::build_mutated(&verilator, &rtl_folder, &configuration);
    let images: Vec<Image> = (0..4)
        .map(|seed| random_image(&configuration, seed))
        .chain([small_model(Packing::T5)])
        .collect();
    let find = |number| {
        let rtl = rtl.with_mutation(number);
        let options = [("--watchdog", 20_000)];
        images.iter().find_map(|image| compare(&rtl, image, &[3], &options).err())
    };
    assert_eq!(find(0), None, "without a fault");
    for (index, mutation) in mutations::ALL.iter().enumerate() {
        let everywhere = [mutations::PROGRAM, "round", "ternary", "row", "writeback"];
        if everywhere.contains(&mutation.bench) {
            let found = find(index + 1);
            let found = found.unwrap_or_else(|| panic!("{}: nothing noticed it", mutation.what));
            println!("{}: {}", mutation.what, found.lines().next().unwrap_or_default());
        }
    }
}

/// The float engine on the CPU beside the simulator, both reading the same tokens.
struct Beside {
    /// What the engine finds most likely after each token.
    best: Vec<u32>,
    /// How far the logits are apart (root mean square), at most.
    furthest: f64,
    /// By how much the engine's best logit exceeds that of the simulator's choice, at most.
    passed_over: f64,
}

/// Lets the engine read `start` and then `chosen`, the simulator's choices. Distances of logits are in standard deviations
/// of the engine's.
fn engine_beside(checkpoint: &Checkpoint, image: &Image, start: u32, chosen: &[u32]) -> Beside {
    let model = Arc::new(Model::load(checkpoint).unwrap());
    let mut state = State::new(&model);
    let mut engine = Engine::new(model, &EngineOptions::default()).unwrap();
    let mut machine = Machine::new(image.clone());
    let mut beside = Beside { best: Vec::new(), furthest: 0.0, passed_over: 0.0 };
    let mut token = start;
    for &next in chosen {
        let theirs = engine.decode(&mut state, token).unwrap().to_vec();
        machine.run(token).unwrap();
        let ours = generate::logits(&machine);
        let mean = theirs.iter().sum::<f32>() / theirs.len() as f32;
        let variance: f32 = theirs.iter().map(|x| (x - mean).powi(2)).sum();
        let squares: f32 = theirs.iter().zip(&ours).map(|(a, b)| (a - b).powi(2)).sum();
        beside.furthest = beside.furthest.max(f64::from((squares / variance).sqrt()));
        let best = theirs.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
        let (best, &largest) = best.unwrap();
        let deviation = (variance / theirs.len() as f32).sqrt();
        let passed_over = f64::from((largest - theirs[next as usize]) / deviation);
        beside.passed_over = beside.passed_over.max(passed_over);
        beside.best.push(best as u32);
        token = next;
    }
    beside
}

/// The simulator, the RTL and the CPU engine with the same weights and the same first token: simulator and RTL write the
/// same, and the timing model knows the RTL's cycles; where the engine would have chosen another token, the two are nearly
/// as likely to it.
fn side_by_side(rtl: &Rtl, checkpoint: &Checkpoint, image: &Image, start: u32, count: usize) {
    let mut machine = Machine::new(image.clone());
    let mut simulated = Vec::new();
    let mut token = start;
    for _ in 0..count {
        token = machine.run(token).unwrap();
        simulated.push(token);
    }
    let options = [("--generate", count as u64), ("--latency", 60)];
    let began = std::time::Instant::now();
    let outcome = rtl.run(image, &[start], &options, false);
    let seconds = began.elapsed().as_secs_f64();
    let memory = Memory { latency: 60.0, weight_rate: 1.0, data_rate: 1.0, stall: 0.0 };
    let expected = timing::estimate(&image.program, &image.configuration, memory).cycles;
    let found = outcome.report["cycles"][0].as_f64().unwrap();
    let beside = engine_beside(checkpoint, image, start, &simulated);
    let same = beside.best.iter().zip(&simulated).filter(|(a, b)| a == b).count();
    println!("simulator  {simulated:?}\nRTL        {}", outcome.report["results"]);
    println!(
        "CPU engine {:?}\n{same} of {count} the same; logits differ by {:.2} %, tokens passed over exceed the \
         simulator's by {:.2} % of the logits' spread, at most",
        beside.best,
        beside.furthest * 100.0,
        beside.passed_over * 100.0
    );
    println!(
        "RTL: {found} cycles for a token, model {expected:.0}; {count} tokens in {seconds:.1} s"
    );
    assert_eq!(outcome.report["results"], serde_json::json!(simulated));
    assert!((expected / found - 1.0).abs() < 0.005, "the timing model says {expected}");
    assert!(beside.furthest < 0.05, "logits differ by {}", beside.furthest);
    assert!(beside.passed_over < 0.1, "the CPU engine prefers {:?}", beside.best);
}

#[test]
fn simulator_rtl_and_cpu_engine_write_the_same_tokens() {
    let Some((_, rtl)) = tiny_rtl() else { return };
    for packing in [Packing::T5, Packing::T2] {
        side_by_side(&rtl, &tiny_checkpoint(), &small_model(packing), 5, 16);
    }
}

/// The built-in model, as many greedy tokens as MMFREE_RTL_TOKENS says: a build and seconds a token, so only on demand.
#[test]
fn the_builtin_model_writes_the_same_tokens_in_rtl() {
    let Ok(count) = std::env::var("MMFREE_RTL_TOKENS") else {
        println!("!!! SKIPPED: set MMFREE_RTL_TOKENS to run the built-in model in RTL");
        return;
    };
    let count = count.parse().unwrap();
    let Some(verilator) = support::verilator() else { return };
    let configuration = Configuration::preset("sim").unwrap();
    let checkpoint = builtin::checkpoint().unwrap();
    let plan = Plan::new(checkpoint.config(), &configuration, Packing::T5).unwrap();
    let image = plan.image(&checkpoint, &mut |_, _| {}).unwrap();
    let rtl = support::build(&verilator, &configuration);
    side_by_side(&rtl, &checkpoint, &image, 1, count);
}
