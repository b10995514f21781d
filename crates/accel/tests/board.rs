//! What the report says of the published sizes on the authors' board.

use mmfree::config::ModelConfig;
use mmfree_accel::config::{Configuration, Packing};
use mmfree_accel::report::{BOARDS, Report, report};

fn on_d5005(size: &str, packing: Packing) -> Report {
    let board = &BOARDS[0];
    let configuration = Configuration::preset(board.configuration).unwrap();
    report(size, &ModelConfig::preset(size).unwrap(), board, &configuration, packing).unwrap()
}

#[test]
fn the_published_sizes_run_near_the_memory_limit() {
    for (size, tokens_per_s, share) in
        [("370m", 800.0, 0.8), ("1.3b", 200.0, 0.8), ("2.7b", 100.0, 0.8)]
    {
        let found = on_d5005(size, Packing::T5);
        println!(
            "{size}: {:.1} tokens/s of {:.1} ({:.1} %), {:.2} W ({:.2} to {:.2}), {:.4} J, {:?} {}",
            found.tokens_per_s,
            found.memory_limit_tokens_per_s,
            found.share_of_memory_limit * 100.0,
            found.watts,
            found.energy.watts.low,
            found.energy.watts.high,
            found.joules_per_token,
            found.energy_ratio,
            found.limited_by,
        );
        assert!(found.tokens_per_s >= tokens_per_s, "{size}: {}", found.tokens_per_s);
        assert!(found.share_of_memory_limit >= share, "{size}: {}", found.share_of_memory_limit);
        assert!(found.share_of_memory_bandwidth < 1.0);
    }
    let found = on_d5005("1.3b", Packing::T5);
    assert!(found.speed_ratio.unwrap() > 8.0);
    let [low, likely, high] = found.energy_ratio.unwrap();
    assert!(low < likely && likely < high && high < 1.0, "{:?}", found.energy_ratio);
}

#[test]
fn five_trits_a_byte_are_faster_than_four() {
    let [t5, t2] = [Packing::T5, Packing::T2].map(|packing| on_d5005("1.3b", packing).tokens_per_s);
    assert!(t5 / t2 > 1.15 && t5 / t2 < 1.3, "{t5} {t2}");
}

/// The published figure is 0.55 J a token.
#[test]
fn watts_and_joules_are_likely_values_within_their_range() {
    for board in &BOARDS {
        let configuration = Configuration {
            activation_bytes: 4096,
            vector_words: 65_536,
            ..Configuration::preset(board.configuration).unwrap()
        };
        let model = ModelConfig::preset("370m").unwrap();
        let found = report("370m", &model, board, &configuration, Packing::T5).unwrap();
        let range = found.energy.joules;
        assert!(range.low < range.likely && range.likely < range.high, "{range:?}");
        assert_eq!(
            (found.watts, found.joules_per_token),
            (found.energy.watts.likely, range.likely)
        );
        assert_eq!(found.technology, board.technology);
    }
    let found = on_d5005("1.3b", Packing::T5);
    let [_, likely, _] = found.energy_ratio.unwrap();
    assert!((found.joules_per_token / (13.0 / 23.8) / likely - 1.0).abs() < 1e-9);
}

#[test]
fn a_model_that_the_board_s_memory_does_not_hold_is_refused() {
    let small = &BOARDS[1];
    let configuration = Configuration {
        activation_bytes: 16_384,
        vector_words: 65_536,
        ..Configuration::preset(small.configuration).unwrap()
    };
    let on_small = |size: &str| {
        report(size, &ModelConfig::preset(size).unwrap(), small, &configuration, Packing::T5)
    };
    on_small("370m").unwrap();
    let error = on_small("2.7b").unwrap_err().to_string();
    assert!(error.contains("first memory channel takes") && error.contains("536870912"), "{error}");
}
