//! GPUs joined by NCCL compute what one does, bit for bit.
//!
//! Each test says what it lacks when it is skipped: a GPU, a second one, NCCL. `MMFREE_REQUIRE_GPUS=2` makes that a
//! failure, for as many GPUs as it says. With `NCCL_P2P_DIRECT_DISABLE=1`, since the ranks are threads of one process.

mod support;

use std::sync::{Mutex, PoisonError};

use mmfree_kernels::cuda::Buffer;
use mmfree_kernels::training::GpuGroup;
use mmfree_train::backend::CudaBackend;
use mmfree_train::communicator::{Communicator, Launch, Local, Nccl, Tcp, parts, shards};
use support::{State, Trajectory, assert_same, train, world};

const STEPS: u64 = 12;

/// Groups of different tests would wait for each other on the same GPUs.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Whether there are `count` GPUs and NCCL.
fn has(count: usize) -> bool {
    let required = std::env::var("MMFREE_REQUIRE_GPUS").ok().map(|text| text.parse::<usize>());
    let required = required.map_or(0, |number| number.expect("MMFREE_REQUIRE_GPUS is a number"));
    let missing = match (CudaBackend::devices(), GpuGroup::unique_id()) {
        (Err(reason), _) => reason.to_string(),
        (Ok(found), _) if found < count => format!("{found} GPUs of {count}"),
        (_, Err(reason)) => reason.to_string(),
        // Ranks are threads here, and NCCL would then read this program's buffers from another GPU, for which their
        // kind of memory is not open.
        _ if count > 1 && std::env::var_os("NCCL_P2P_DIRECT_DISABLE").is_none() => {
            "set NCCL_P2P_DIRECT_DISABLE=1".to_owned()
        }
        _ => return true,
    };
    assert!(required < count, "{missing}");
    eprintln!("!!! SKIPPED, {count} GPUs are needed: {missing}");
    false
}

/// One of several processes with a GPU each, or of one without NCCL.
fn run(launch: Option<Launch>, set: &[&str], from: Option<&State>) -> (Trajectory, State) {
    let device = launch.as_ref().map_or(0, |launch| launch.local_rank);
    let backend = CudaBackend::new(device).unwrap();
    let processes: Box<dyn Communicator<_>> = match launch {
        None => Box::new(Local),
        Some(launch) if launch.world_size == 1 => {
            Box::new(Nccl::join(backend.device(), Box::new(Local)).unwrap())
        }
        Some(launch) => {
            let host = Box::new(Tcp::join(&launch).unwrap());
            Box::new(Nccl::join(backend.device(), host).unwrap())
        }
    };
    let steps = if from.is_some() { STEPS..2 * STEPS } else { 0..STEPS };
    let (trajectory, state, mut processes) = train(backend, processes, steps, set, from);
    processes.finish();
    (trajectory, state)
}

#[test]
fn a_world_of_one_is_no_communicator() {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    if !has(1) {
        return;
    }
    let expected = run(None, &[], None);
    for found in world(1, |launch| run(Some(launch), &[], None)) {
        assert_same(&found.0, &expected.0, "a world of one");
        assert!(found.1 == expected.1, "moments");
    }
}

#[test]
fn two_gpus_give_the_bits_of_one_also_after_resuming() {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    if !has(2) {
        return;
    }
    for groups in ["2", "8"] {
        let set = [&*format!("batch.reduction_groups={groups}")];
        let what = format!("{groups} groups");
        let alone = run(None, &set, None);
        let continued = run(None, &set, Some(&alone.1));
        let together = world(2, |launch| run(Some(launch), &set, None));
        for found in &together {
            assert_same(&found.0, &alone.0, &what);
            assert!(found.1 == alone.1, "moments, {what}");
        }
        // Two go on from one, and one from two.
        for found in world(2, |launch| run(Some(launch), &set, Some(&alone.1))) {
            assert_same(&found.0, &continued.0, &format!("{what}, two after one"));
        }
        let found = run(None, &set, Some(&together[0].1));
        assert_same(&found.0, &continued.0, &format!("{what}, one after two"));
    }
}

#[test]
fn exchanges_of_large_buffers_are_exact() {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    if !has(2) {
        return;
    }
    // More than one block of every shard, and a part that lies in both shards.
    const LEN: usize = (1 << 26) + 12_345;
    let value = |rank: usize, at: usize| ((at * 7 + rank * 13) % 101) as f32 * 0.37 - 3.0;
    let cuts = shards(LEN, 1 << 16, 2);
    world(2, |launch| {
        let rank = launch.rank;
        let backend = CudaBackend::new(launch.local_rank).unwrap();
        let host = Box::new(Tcp::join(&launch).unwrap());
        let mut nccl = Nccl::join(backend.device(), host).unwrap();
        let values: Vec<f32> = (0..LEN).map(|at| value(rank, at)).collect();
        let mut buffer = Buffer::from_slice(backend.device(), &values).unwrap();
        for part in [LEN / 3..LEN, 0..LEN / 3] {
            nccl.reduce_scatter(&mut buffer, &parts(&cuts, &part)).unwrap();
        }
        nccl.all_gather(&mut buffer, &cuts).unwrap();
        nccl.wait().unwrap();
        let mut found = vec![0.0; LEN];
        buffer.read(0, &mut found).unwrap();
        let wrong = (0..LEN).find(|&at| found[at] != value(0, at) + value(1, at));
        assert_eq!(wrong, None, "first sum that is wrong");
        let mut buffer = Buffer::from_slice(backend.device(), &values).unwrap();
        nccl.broadcast(&mut buffer).unwrap();
        nccl.wait().unwrap();
        buffer.read(0, &mut found).unwrap();
        let wrong = (0..LEN).find(|&at| found[at] != value(0, at));
        assert_eq!(wrong, None, "first value that is not process 0's");
        nccl.barrier().unwrap();
        nccl.finish();
    });
}

#[test]
fn a_lost_process_is_noticed() {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    if !has(2) {
        return;
    }
    let errors = world(2, |launch| {
        let backend = CudaBackend::new(launch.local_rank).unwrap();
        let host = Box::new(Tcp::join(&launch).unwrap());
        let mut nccl = Nccl::join(backend.device(), host).unwrap();
        let mut buffer = Buffer::zeros(backend.device(), 1 << 20).unwrap();
        let cuts = shards(1 << 20, 1 << 16, 2);
        nccl.all_gather(&mut buffer, &cuts).unwrap();
        nccl.wait().unwrap();
        if launch.rank == 1 {
            return None;
        }
        let begun = nccl.reduce_scatter(&mut buffer, &cuts);
        Some(begun.and_then(|()| nccl.wait()).unwrap_err().to_string())
    });
    println!("{errors:?}");
    assert!(errors.into_iter().flatten().count() == 1);
}
