//! The Transformer++ baseline: Llama as Hugging Face stores it.

use serde::Serialize;
use serde_json::{Value, json};

use super::fields::{self, FieldReader};
use super::{
    MAX_HIDDEN_SIZE, MAX_INTERMEDIATE_SIZE, MAX_LAYERS, MAX_VOCAB_SIZE, float_json, token_ids_json,
};
use crate::error::Result;

/// Configuration of a Transformer++ (`model_type` `llama`), validated: RMSNorm, RoPE, causal softmax
/// attention with as many key heads as query heads, SwiGLU, full-precision weights without bias.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TransformerConfig {
    /// V, rows of the embedding table and of the head.
    pub vocab_size: usize,
    /// D, width of the residual stream.
    pub hidden_size: usize,
    /// F, width of the channel mixer.
    pub intermediate_size: usize,
    /// L, number of blocks.
    pub num_hidden_layers: usize,
    /// H; D / H must be even.
    pub num_attention_heads: usize,
    /// ε of the norms.
    pub rms_norm_eps: f32,
    /// Base of the rotary embedding's frequencies.
    pub rope_theta: f32,
    /// Longest text that the model is meant for; written to checkpoints.
    pub max_position_embeddings: usize,
    /// Token that begins a text, if the model has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

impl TransformerConfig {
    /// Reads a Hugging Face `config.json`. `file` names it in errors.
    ///
    /// # Errors
    /// [`Malformed`](crate::error::Error::Malformed) if it is no JSON object, otherwise one
    /// [`Config`](crate::error::Error::Config) with everything that is missing, out of bounds or asks for
    /// something that is not computed here.
    pub fn from_json(file: &str, bytes: &[u8]) -> Result<Self> {
        let fields = fields::parse(file, bytes)?;
        let mut reader = FieldReader { fields: &fields, problems: Vec::new() };
        reader.refuse_other_llamas();
        let heads = reader.size("num_attention_heads").unwrap_or(0);
        let config = Self {
            vocab_size: reader.size("vocab_size").unwrap_or(0),
            hidden_size: reader.size("hidden_size").unwrap_or(0),
            intermediate_size: reader.size("intermediate_size").unwrap_or(0),
            num_hidden_layers: reader.size("num_hidden_layers").unwrap_or(0),
            num_attention_heads: heads,
            rms_norm_eps: reader.float("rms_norm_eps", 1e-6) as f32,
            rope_theta: reader.rope_theta() as f32,
            max_position_embeddings: match reader.get("max_position_embeddings") {
                None => 2048,
                Some(_) => reader.size("max_position_embeddings").unwrap_or(0),
            },
            bos_token_id: reader.token_ids("bos_token_id").first().copied(),
            eos_token_ids: reader.token_ids("eos_token_id"),
        };
        for (name, expected) in [
            ("num_key_value_heads", Some(heads)),
            ("head_dim", config.hidden_size.checked_div(heads)),
        ] {
            let value = reader.get(name).map(|value| value.as_u64().map(|n| n as usize));
            if value.is_some_and(|value| value != expected) {
                let expected = expected.map_or("a size".to_owned(), |n| n.to_string());
                reader.problem(
                    name,
                    &format!("{expected} (grouped queries and other head sizes are not supported)"),
                );
            }
        }
        fields::checked(file, reader.problems, config, Self::problems)
    }

    /// Everything that keeps the configuration from being run; empty if it is fine.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = fields::size_problems(&[
            ("vocab_size", self.vocab_size, MAX_VOCAB_SIZE),
            ("hidden_size", self.hidden_size, MAX_HIDDEN_SIZE),
            ("intermediate_size", self.intermediate_size, MAX_INTERMEDIATE_SIZE),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MAX_HIDDEN_SIZE),
            ("max_position_embeddings", self.max_position_embeddings, usize::MAX),
        ]);
        let (d, heads) = (self.hidden_size, self.num_attention_heads);
        if heads > 0 && !d.is_multiple_of(2 * heads) {
            problems.push(format!(
                "hidden_size is {d}, expected a multiple of twice num_attention_heads {heads}"
            ));
        }
        problems.extend(fields::epsilon_problem(self.rms_norm_eps));
        if !(self.rope_theta >= 1.0 && self.rope_theta <= 1e12) {
            problems.push(format!("rope_theta is {}, expected 1 to 1e12", self.rope_theta));
        }
        problems.extend(fields::token_problems(
            self.vocab_size,
            self.bos_token_id,
            &self.eos_token_ids,
        ));
        problems
    }

    /// Names and shapes of the tensors, as Hugging Face's Llama has them, in the order of a forward pass. Projections
    /// of one input follow each other.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (d, f, v) = (self.hidden_size, self.intermediate_size, self.vocab_size);
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![v, d])];
        for layer in 0..self.num_hidden_layers {
            for (name, shape) in [
                ("input_layernorm", vec![d]),
                ("self_attn.q_proj", vec![d, d]),
                ("self_attn.k_proj", vec![d, d]),
                ("self_attn.v_proj", vec![d, d]),
                ("self_attn.o_proj", vec![d, d]),
                ("post_attention_layernorm", vec![d]),
                ("mlp.gate_proj", vec![f, d]),
                ("mlp.up_proj", vec![f, d]),
                ("mlp.down_proj", vec![d, f]),
            ] {
                tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
            }
        }
        tensors.push(("model.norm.weight".to_owned(), vec![d]));
        tensors.push(("lm_head.weight".to_owned(), vec![v, d]));
        tensors
    }

    /// The `config.json` that Hugging Face's Llama reads.
    pub fn to_json(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": token_ids_json(&self.eos_token_ids),
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": false,
            "model_type": "llama",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_attention_heads,
            "rms_norm_eps": float_json(self.rms_norm_eps),
            "rope_scaling": null,
            "rope_theta": float_json(self.rope_theta),
            "tie_word_embeddings": false,
            "use_cache": true,
            "vocab_size": self.vocab_size,
        })
    }
}

impl FieldReader<'_> {
    /// Valid configurations of Llama that would compute something else than this project does.
    fn refuse_other_llamas(&mut self) {
        if self.get("model_type") != Some(&Value::from("llama")) {
            self.problem("model_type", "\"llama\"");
        }
        for (name, what) in [
            ("tie_word_embeddings", "a head that shares the embeddings is not supported"),
            ("attention_bias", "biases are not supported"),
            ("mlp_bias", "biases are not supported"),
        ] {
            if self.get(name).is_some_and(|value| value != &Value::Bool(false)) {
                self.problem(name, &format!("false ({what})"));
            }
        }
        if self.get("hidden_act").is_some_and(|act| act != "silu" && act != "swish") {
            self.problem("hidden_act", "\"silu\"");
        }
        for name in ["rope_scaling", "quantization_config"] {
            if self.get(name).is_some() {
                self.problem(name, "none (it is not supported)");
            }
        }
    }

    /// The base of the rotary embedding: its own field, or one of `rope_parameters`.
    fn rope_theta(&mut self) -> f64 {
        const DEFAULT: f64 = 10_000.0;
        let Some(Value::Object(parameters)) = self.get("rope_parameters") else {
            return self.float("rope_theta", DEFAULT);
        };
        let mut nested = FieldReader { fields: parameters, problems: Vec::new() };
        if nested.get("rope_type").is_some_and(|kind| kind != "default") {
            nested.problem("rope_type", "\"default\"");
        }
        let theta = nested.float("rope_theta", DEFAULT);
        self.problems.append(&mut nested.problems);
        theta
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: &Value) -> Result<TransformerConfig> {
        TransformerConfig::from_json("config.json", value.to_string().as_bytes())
    }

    fn small() -> TransformerConfig {
        TransformerConfig {
            vocab_size: 97,
            hidden_size: 48,
            intermediate_size: 80,
            num_hidden_layers: 2,
            num_attention_heads: 3,
            rms_norm_eps: 1e-5,
            rope_theta: 5e5,
            max_position_embeddings: 512,
            bos_token_id: Some(1),
            eos_token_ids: vec![2, 3],
        }
    }

    #[test]
    fn what_is_written_reads_the_same() {
        assert_eq!(parse(&small().to_json()).unwrap(), small());
        let mut newer = small().to_json();
        newer.as_object_mut().unwrap().remove("rope_theta");
        newer["rope_parameters"] = json!({"rope_theta": 5e5, "rope_type": "default"});
        assert_eq!(parse(&newer).unwrap(), small());
    }

    #[test]
    fn every_problem_is_named_in_one_error() {
        let mut config = small().to_json();
        for (name, value) in [
            ("model_type", json!("mistral")),
            ("num_key_value_heads", json!(1)),
            ("head_dim", json!(32)),
            ("attention_bias", json!(true)),
            ("tie_word_embeddings", json!(true)),
            ("rope_scaling", json!({"factor": 8.0})),
            ("rope_parameters", json!({"rope_type": "yarn"})),
            ("hidden_act", json!("gelu")),
            ("vocab_size", json!(-1)),
        ] {
            config[name] = value;
        }
        let error = parse(&config).unwrap_err().to_string();
        for name in [
            "model_type",
            "num_key_value_heads",
            "head_dim",
            "attention_bias",
            "tie_word_embeddings",
            "rope_scaling",
            "rope_type",
            "hidden_act",
            "vocab_size",
        ] {
            assert!(error.contains(name), "{name} is not in: {error}");
        }
        let mut odd = small();
        odd.hidden_size = 51;
        assert!(odd.problems()[0].contains("multiple of twice"), "{:?}", odd.problems());
    }
}
