//! Sizes and constants of a model.

mod fields;
mod transformer;

use serde::Serialize;
use serde_json::{Value, json};

use self::fields::FieldReader;
use crate::checkpoint::layout::{TensorKind, expected_tensors};
use crate::error::Result;

pub use transformer::TransformerConfig;

/// Configuration of a MatMul-free language model (`model_type` `hgrn_bit`), validated.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelConfig {
    /// V, rows of the embedding table and of the head.
    pub vocab_size: usize,
    /// D, width of the residual stream and of the recurrent state.
    pub hidden_size: usize,
    /// F, width of the GLU channel mixer; `gate_proj` is [2F, D].
    pub intermediate_size: usize,
    /// L, number of blocks.
    pub num_hidden_layers: usize,
    /// ε of the norms outside BitLinear (inside it is always 1e-6).
    pub rms_norm_eps: f32,
    /// Whether forget gates have the learned lower bounds β; without them β = 0.
    pub use_lower_bound: bool,
    /// Token that begins a text, if the model has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

/// How many parameters a model has, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ParameterCounts {
    /// Weights of BitLinear layers, the head included.
    pub ternary: usize,
    /// The embedding table.
    pub embeddings: usize,
    /// Weights of every RMSNorm, those inside BitLinear included.
    pub norms: usize,
    /// The learned lower bounds of the forget gates.
    pub lower_bounds: usize,
    /// All of them.
    pub total: usize,
}

/// Largest V. Far above any vocabulary, and low enough that no product of sizes overflows.
const MAX_VOCAB_SIZE: usize = 1 << 22;
/// Largest D.
const MAX_HIDDEN_SIZE: usize = 1 << 16;
/// Largest F.
const MAX_INTERMEDIATE_SIZE: usize = 1 << 18;
/// Largest L.
const MAX_LAYERS: usize = 1 << 10;

/// Names and (D, L) of the published sizes, and of two more for measuring.
const PRESETS: [(&str, usize, usize); 5] = [
    ("370m", 1024, 24),
    ("1.3b", 2048, 24),
    ("2.7b", 2560, 32),
    ("7b", 4096, 32),
    ("13b", 5120, 40),
];

impl ModelConfig {
    /// The configuration of a published size: `370m`, `1.3b`, `2.7b`, and for measuring `7b`, `13b`.
    /// `None` for another name.
    pub fn preset(name: &str) -> Option<Self> {
        let &(_, hidden_size, num_hidden_layers) =
            PRESETS.iter().find(|(preset, ..)| preset.eq_ignore_ascii_case(name))?;
        Some(Self {
            vocab_size: 32_000,
            hidden_size,
            intermediate_size: default_intermediate_size(hidden_size, 4.0),
            num_hidden_layers,
            rms_norm_eps: 1e-6,
            use_lower_bound: true,
            bos_token_id: Some(1),
            eos_token_ids: vec![2],
        })
    }

    /// The names that [`preset`](Self::preset) knows.
    pub fn preset_names() -> impl Iterator<Item = &'static str> {
        PRESETS.iter().map(|&(name, ..)| name)
    }

    /// Reads a Hugging Face `config.json`. `file` names it in errors.
    ///
    /// # Errors
    /// [`Malformed`](crate::error::Error::Malformed) if it is no JSON object, otherwise one
    /// [`Config`](crate::error::Error::Config) with everything that is missing, out of bounds or asks for
    /// something that is not computed here.
    pub fn from_json(file: &str, bytes: &[u8]) -> Result<Self> {
        let fields = fields::parse(file, bytes)?;
        let mut reader = FieldReader { fields: &fields, problems: Vec::new() };
        reader.refuse_unsupported();
        let hidden_size = reader.size("hidden_size").unwrap_or(0);
        let config = Self {
            vocab_size: reader.size("vocab_size").unwrap_or(0),
            hidden_size,
            intermediate_size: reader.intermediate_size(hidden_size),
            num_hidden_layers: reader.size("num_hidden_layers").unwrap_or(0),
            rms_norm_eps: reader.float("rms_norm_eps", 1e-6) as f32,
            use_lower_bound: reader.boolean("use_lower_bound", true),
            bos_token_id: reader.token_ids("bos_token_id").first().copied(),
            eos_token_ids: reader.token_ids("eos_token_id"),
        };
        fields::checked(file, reader.problems, config, Self::problems)
    }

    /// Everything that keeps the configuration from being run; empty if it is fine.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = fields::size_problems(&[
            ("vocab_size", self.vocab_size, MAX_VOCAB_SIZE),
            ("hidden_size", self.hidden_size, MAX_HIDDEN_SIZE),
            ("intermediate_size", self.intermediate_size, MAX_INTERMEDIATE_SIZE),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
        ]);
        problems.extend(fields::epsilon_problem(self.rms_norm_eps));
        problems.extend(fields::token_problems(
            self.vocab_size,
            self.bos_token_id,
            &self.eos_token_ids,
        ));
        problems
    }

    /// The `config.json` that the authors' code reads: every field that it knows, with the values that
    /// this project supports.
    pub fn to_json(&self) -> Value {
        json!({
            "architectures": ["HGRNBitForCausalLM"],
            "attn_mode": "fused_recurrent",
            "bos_token_id": self.bos_token_id,
            "conv_size": 4,
            "eos_token_id": token_ids_json(&self.eos_token_ids),
            "expand_ratio": 1,
            "fuse_cross_entropy": true,
            "hidden_act": "swish",
            "hidden_ratio": 4,
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": 2048,
            "model_type": "hgrn_bit",
            "num_heads": 1,
            "num_hidden_layers": self.num_hidden_layers,
            "rms_norm_eps": float_json(self.rms_norm_eps),
            "share_conv_kernel": true,
            "tie_word_embeddings": false,
            "use_cache": true,
            "use_lower_bound": self.use_lower_bound,
            "use_short_conv": false,
            "vocab_size": self.vocab_size,
        })
    }

    /// Counts parameters.
    pub fn parameters(&self) -> ParameterCounts {
        let mut counts = ParameterCounts::default();
        for tensor in expected_tensors(self) {
            let elements = tensor.elements();
            *match tensor.kind {
                TensorKind::Ternary => &mut counts.ternary,
                TensorKind::Embeddings => &mut counts.embeddings,
                TensorKind::Norm => &mut counts.norms,
                TensorKind::LowerBounds => &mut counts.lower_bounds,
            } += elements;
            counts.total += elements;
        }
        counts
    }
}

/// An f32 with its shortest decimal digits, not those of the f64 nearest to it.
fn float_json(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

/// As Hugging Face writes them: nothing, one id, or a list.
fn token_ids_json(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [id] => Value::from(*id),
        ids => Value::from(ids),
    }
}

/// `256 · ceil(int(D · hidden_ratio · 2/3) / 256)`, in the floating-point order of the reference.
fn default_intermediate_size(hidden_size: usize, hidden_ratio: f64) -> usize {
    let width = (hidden_size as f64 * hidden_ratio * 2.0 / 3.0) as usize;
    width.div_ceil(256).saturating_mul(256)
}

impl FieldReader<'_> {
    /// Valid configurations of the reference that would compute something else than this project does.
    fn refuse_unsupported(&mut self) {
        if self.get("model_type") != Some(&Value::from("hgrn_bit")) {
            // What `mmfree train` writes for its baseline, among others.
            let hint = match self.get("model_type").and_then(Value::as_str) {
                Some("llama") => " (a Transformer++ is trained here, but runs in transformers)",
                _ => "",
            };
            self.problem("model_type", &format!("\"hgrn_bit\"{hint}"));
        }
        for name in ["num_heads", "expand_ratio"] {
            if self.get(name).is_some_and(|value| value.as_f64() != Some(1.0)) {
                self.problem(name, "1 (several heads and wider states are not supported)");
            }
        }
        for (name, what) in [
            ("use_short_conv", "short convolutions are not supported"),
            ("tie_word_embeddings", "a head that shares the embeddings is not supported"),
        ] {
            if self.get(name).is_some_and(|value| value != &Value::Bool(false)) {
                self.problem(name, &format!("false ({what})"));
            }
        }
        if let Some(act) = self.get("hidden_act")
            && act != "swish"
            && act != "silu"
        {
            self.problem("hidden_act", "\"swish\" or \"silu\"");
        }
        if self.get("quantization_config").is_some() {
            self.problem("quantization_config", "none (weights must be stored in full precision)");
        }
    }

    fn intermediate_size(&mut self, hidden_size: usize) -> usize {
        if self.get("intermediate_size").is_some() {
            return self.size("intermediate_size").unwrap_or(0);
        }
        let ratio = self.float("hidden_ratio", 4.0);
        if !(ratio > 0.0 && ratio <= 1024.0) {
            self.problem("hidden_ratio", "a positive number of at most 1024");
        }
        default_intermediate_size(hidden_size, ratio)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ModelConfig> {
        ModelConfig::from_json("config.json", text.as_bytes())
    }

    fn minimal(extra: &str) -> String {
        format!(
            r#"{{"model_type": "hgrn_bit", "vocab_size": 97, "hidden_size": 64,
                "num_hidden_layers": 3 {extra}}}"#
        )
    }

    #[test]
    fn absent_fields_take_the_defaults_of_the_reference() {
        let config = parse(&minimal("")).unwrap();
        assert_eq!(config.intermediate_size, 256);
        assert!(config.use_lower_bound && config.eos_token_ids.is_empty());
        assert_eq!(config.rms_norm_eps, 1e-6);
        let config = parse(&minimal(
            r#", "intermediate_size": null, "hidden_ratio": 7, "eos_token_id": [2, 5],
               "bos_token_id": 1, "use_lower_bound": false"#,
        ));
        let config = config.unwrap();
        assert_eq!(config.intermediate_size, 512); // int(64·7·2/3) = 298
        assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(1), vec![2, 5]));
        assert!(!config.use_lower_bound);
    }

    #[test]
    fn what_is_written_reads_the_same() {
        let mut config = ModelConfig::preset("370m").unwrap();
        for (use_lower_bound, eos_token_ids) in
            [(true, vec![]), (false, vec![2]), (true, vec![2, 3])]
        {
            config = ModelConfig { use_lower_bound, eos_token_ids, rms_norm_eps: 1e-5, ..config };
            assert_eq!(parse(&config.to_json().to_string()).unwrap(), config);
        }
    }

    #[test]
    fn every_problem_is_named_in_one_error() {
        let error = parse(
            r#"{"model_type": "llama", "num_heads": 2, "expand_ratio": 1.5, "use_short_conv": true,
                "tie_word_embeddings": true, "hidden_act": "gelu", "hidden_size": -4,
                "vocab_size": "x", "rms_norm_eps": false, "eos_token_id": [1, -1],
                "quantization_config": {}, "use_lower_bound": 0}"#,
        )
        .unwrap_err()
        .to_string();
        for name in [
            "model_type is \"llama\"",
            "num_heads is 2",
            "expand_ratio is 1.5",
            "use_short_conv",
            "tie_word_embeddings",
            "hidden_act is \"gelu\"",
            "hidden_size is -4",
            "vocab_size is \"x\"",
            "num_hidden_layers is missing",
            "rms_norm_eps",
            "eos_token_id is [1,-1]",
            "quantization_config",
            "use_lower_bound is 0",
        ] {
            assert!(error.contains(name), "{name} is not in: {error}");
        }
    }

    #[test]
    fn sizes_have_bounds() {
        for field in ["hidden_size", "vocab_size", "num_hidden_layers"] {
            for value in ["0", "18446744073709551615", "1e3", "99999999"] {
                let text = minimal("").replace(
                    &format!("\"{field}\": "),
                    &format!("\"{field}\": {value}, \"was_{field}\": "),
                );
                let error = parse(&text).unwrap_err().to_string();
                assert!(error.contains(field), "{error}");
            }
        }
        for extra in [
            r#", "intermediate_size": 0"#,
            r#", "hidden_ratio": 1e300"#,
            r#", "hidden_ratio": -1"#,
            r#", "rms_norm_eps": 0"#,
            r#", "eos_token_id": 97"#,
            r#", "bos_token_id": 4294967296"#,
            r#", "vocab_size": 97"#,
        ] {
            assert!(parse(&minimal(extra)).is_err(), "{extra}");
        }
    }

    #[test]
    fn presets_have_the_published_sizes() {
        let sizes: Vec<_> = ModelConfig::preset_names()
            .map(|name| {
                let config = ModelConfig::preset(name).unwrap();
                assert_eq!(config.problems(), Vec::<String>::new());
                (config.intermediate_size, config.parameters().total / 1_000_000)
            })
            .collect();
        let expected = [(2816, 374), (5632, 1_364), (6912, 2_702), (11008, 6_739), (13824, 13_017)];
        assert_eq!(sizes, expected);
        assert!(ModelConfig::preset("3b").is_none());
    }
}
