//! Floating-point types of stored tensors.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use serde::Serialize;

/// How a file stores floating-point values, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FloatType {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// The upper half of an IEEE single.
    Bf16,
}

impl FloatType {
    /// Bytes of a value.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The name in safetensors headers, also used in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
        }
    }

    /// The type with a name of safetensors.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        [Self::F32, Self::F16, Self::Bf16].into_iter().find(|float| float.name() == name)
    }

    /// ggml's number for the type.
    pub(super) const fn ggml_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 30,
        }
    }

    /// The type with a ggml number.
    pub(super) fn from_ggml_type(number: u32) -> Option<Self> {
        [Self::F32, Self::F16, Self::Bf16].into_iter().find(|float| float.ggml_type() == number)
    }

    /// Widens values, exactly. `bytes` holds `out.len()` of them.
    pub(super) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), out.len() * self.bytes());
        match self {
            Self::F32 => {
                for (value, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *value = f32::from_le_bytes(*bytes);
                }
            }
            Self::Bf16 => {
                for (value, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                }
            }
            Self::F16 => {
                // Through aligned scratch, so that the conversion runs on whole vectors.
                let mut halves = [f16::ZERO; 256];
                for (values, bytes) in out.chunks_mut(256).zip(bytes.chunks(512)) {
                    let halves = &mut halves[..values.len()];
                    for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks().0) {
                        *half = f16::from_le_bytes(*bytes);
                    }
                    halves.convert_to_f32_slice(values);
                }
            }
        }
    }

    /// Appends values, rounded half to even.
    pub(super) fn encode(self, values: &[f32], out: &mut Vec<u8>) {
        match self {
            Self::F32 => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),
            Self::F16 => out.extend(values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes())),
            Self::Bf16 => out.extend(values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_survives_widening() {
        let bits: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for float in [FloatType::F16, FloatType::Bf16] {
            let mut values = vec![0.0; 1 << 16];
            float.decode(&bits, &mut values);
            let mut back = Vec::new();
            float.encode(&values, &mut back);
            for (i, (pair, value)) in back.chunks(2).zip(&values).enumerate() {
                assert!(value.is_nan() || pair == &bits[2 * i..2 * i + 2], "{float:?} {i:#06x}");
            }
        }
        assert_eq!(FloatType::F16.bytes(), 2);
    }
}
