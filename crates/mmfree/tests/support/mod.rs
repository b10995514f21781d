//! Small random models in memory, as the files of a Hugging Face directory.

// Every test program uses its own part of this.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use half::{bf16, f16};
use mmfree::checkpoint::{Checkpoint, FloatType};
use mmfree::error::Result;
use mmfree_kernels::memory::WeightArena;
use mmfree_kernels::ternary::{Layout, TernaryMatrix};
use serde_json::{Map, Value, json};

/// A tensor of a Hugging Face checkpoint.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

impl Tensor {
    pub fn new(name: &str, float: FloatType, shape: &[usize], values: &[f32]) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        let data = match float {
            FloatType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            FloatType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            FloatType::Bf16 => {
                values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect()
            }
        };
        Self { name: name.to_owned(), dtype: float.name(), shape: shape.to_vec(), data }
    }
}

/// Sizes of a random model.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub hidden: usize,
    pub intermediate: usize,
    pub vocab: usize,
    pub layers: usize,
}

impl Sizes {
    pub const SMALL: Self = Self { hidden: 5, intermediate: 7, vocab: 6, layers: 1 };

    pub fn config(&self) -> Value {
        json!({"model_type": "hgrn_bit", "hidden_size": self.hidden, "vocab_size": self.vocab,
               "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
               "bos_token_id": 1, "eos_token_id": [2, 3]})
    }

    /// Names (without `.weight`) and shapes of the ternary tensors.
    pub fn ternary(&self) -> Vec<(String, usize, usize)> {
        let (d, f) = (self.hidden, self.intermediate);
        let mut tensors = Vec::new();
        for layer in 0..self.layers {
            let block = format!("model.layers.{layer}");
            for name in ["i_proj", "f_proj", "g_proj", "o_proj"] {
                tensors.push((format!("{block}.attn.{name}"), d, d));
            }
            tensors.push((format!("{block}.mlp.gate_proj"), 2 * f, d));
            tensors.push((format!("{block}.mlp.down_proj"), d, f));
        }
        tensors.push(("lm_head".to_owned(), self.vocab, d));
        tensors
    }

    /// Names and lengths of the vectors.
    pub fn vectors(&self) -> Vec<(String, usize)> {
        let mut vectors = vec![("model.norm.weight".to_owned(), self.hidden)];
        for layer in 0..self.layers {
            for name in ["attn_norm", "attn.g_norm", "mlp_norm"] {
                vectors.push((format!("model.layers.{layer}.{name}.weight"), self.hidden));
            }
        }
        let inner = self.ternary().into_iter();
        vectors.extend(inner.map(|(name, _, cols)| (format!("{name}.norm.weight"), cols)));
        vectors
    }

    pub fn tensors(&self, float: FloatType) -> Vec<Tensor> {
        let mut state = 0x9e37_79b9_u32;
        let mut make = |name: &str, shape: &[usize]| {
            let values: Vec<f32> = (0..shape.iter().product())
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / (1 << 23) as f32 - 1.0
                })
                .collect();
            Tensor::new(name, float, shape, &values)
        };
        let mut tensors = vec![
            make("model.embeddings.weight", &[self.vocab, self.hidden]),
            make("model.lower_bounds", &[self.layers, self.hidden]),
        ];
        for (name, len) in self.vectors() {
            tensors.push(make(&name, &[len]));
        }
        for (name, rows, cols) in self.ternary() {
            tensors.push(make(&format!("{name}.weight"), &[rows, cols]));
        }
        tensors
    }
}

/// A safetensors file.
pub fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let mut header = Map::new();
    let mut data = Vec::new();
    for tensor in tensors {
        let end = data.len() + tensor.data.len();
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape,
                           "data_offsets": [data.len(), end]});
        header.insert(tensor.name.clone(), entry);
        data.extend(&tensor.data);
    }
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

/// Bytes that live as long as the tests.
pub fn leak(bytes: Vec<u8>) -> &'static [u8] {
    bytes.leak()
}

/// Opens a configuration and tensors from memory.
pub fn open(config: &Value, tensors: &[Tensor]) -> Result<Checkpoint> {
    Checkpoint::from_static_files(&[
        ("config.json", leak(config.to_string().into_bytes())),
        ("model.safetensors", leak(safetensors(tensors))),
    ])
}

/// Everything that a model is loaded from.
#[derive(Debug)]
pub struct Loaded {
    pub ternary: Vec<TernaryMatrix>,
    pub vectors: Vec<Vec<f32>>,
    pub lower_bounds: Vec<f32>,
    pub embeddings: Vec<f32>,
}

/// Reads all of a checkpoint.
pub fn load(checkpoint: &Checkpoint) -> Result<Loaded> {
    let config = checkpoint.config();
    let sizes = Sizes {
        hidden: config.hidden_size,
        intermediate: config.intermediate_size,
        vocab: config.vocab_size,
        layers: config.num_hidden_layers,
    };
    // Shared: a fresh one zeroes a huge page for every load.
    static ARENA: OnceLock<WeightArena> = OnceLock::new();
    let arena = ARENA.get_or_init(WeightArena::new);
    let table = checkpoint.embeddings()?;
    let mut embeddings = vec![f32::NAN; sizes.vocab * sizes.hidden];
    for (id, row) in embeddings.chunks_mut(sizes.hidden).enumerate() {
        table.row_into(id as u32, row)?;
    }
    checkpoint.tokenizer()?;
    Ok(Loaded {
        ternary: sizes
            .ternary()
            .iter()
            .map(|(name, rows, cols)| {
                checkpoint.ternary_in(name, *rows, *cols, Layout::Base3, arena)
            })
            .collect::<Result<_>>()?,
        vectors: sizes
            .vectors()
            .iter()
            .map(|(name, len)| checkpoint.vector(name, *len))
            .collect::<Result<_>>()?,
        lower_bounds: match config.use_lower_bound {
            true => checkpoint.matrix_f32("model.lower_bounds", sizes.layers, sizes.hidden)?,
            false => Vec::new(),
        },
        embeddings,
    })
}

impl PartialEq for Loaded {
    fn eq(&self, other: &Self) -> bool {
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        self.ternary.len() == other.ternary.len()
            && self.ternary.iter().zip(&other.ternary).all(|(a, b)| {
                (a.rows(), a.cols()) == (b.rows(), b.cols())
                    && a.scale().to_bits() == b.scale().to_bits()
                    && a.codes() == b.codes()
            })
            && self.vectors == other.vectors
            && bits(&self.lower_bounds) == bits(&other.lower_bounds)
            && bits(&self.embeddings) == bits(&other.embeddings)
    }
}

/// The fixtures of the repository.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

/// Names of everything in a directory, sorted.
pub fn names_in(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).expect("a directory");
    let mut names: Vec<_> = entries
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
        .collect();
    names.sort();
    names
}
