//! Lists of token ids on the command line and in files.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};

/// Largest file of ids that is read, in bytes.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// Ids as `1,5,9`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenIds(pub Vec<u32>);

impl FromStr for TokenIds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = |part: &str| {
            let part = part.trim();
            part.parse().map_err(|_| format!("{part:?} is no token id; expected ids as in 1,5,9"))
        };
        text.split(',').map(parse).collect::<Result<_, _>>().map(Self)
    }
}

/// Refuses ids that the vocabulary does not have.
pub fn check(ids: &[u32], vocab_size: usize) -> Result<()> {
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(id) => bail!("token id {id} is outside the vocabulary of {vocab_size}"),
        None => Ok(()),
    }
}

/// T of sequences that all have the same length.
pub fn sequence_length(sequences: &[Vec<u32>]) -> Result<usize> {
    let Some(first) = sequences.first() else { bail!("no token ids are given") };
    ensure!(!first.is_empty(), "a list of token ids is empty");
    match sequences.iter().position(|ids| ids.len() != first.len()) {
        None => Ok(first.len()),
        Some(index) => bail!(
            "lists of token ids must have one length: the first has {}, number {} has {}",
            first.len(),
            index + 1,
            sequences[index].len()
        ),
    }
}

/// Reads a JSON list of lists of ids.
pub fn read_file(path: &Path) -> Result<Vec<Vec<u32>>> {
    let read = || {
        let mut bytes = Vec::new();
        File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(bytes)
    };
    let bytes = read().with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(
        bytes.len() as u64 <= MAX_FILE_BYTES,
        "{} has more than the {} MiB that are read",
        path.display(),
        MAX_FILE_BYTES >> 20
    );
    serde_json::from_slice(&bytes).with_context(|| {
        format!("{} is no JSON list of lists of ids, as in [[1,5,9],[1,5,7]]", path.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_separated_by_commas() {
        assert_eq!("1, 5,9".parse(), Ok(TokenIds(vec![1, 5, 9])));
        assert_eq!("7".parse(), Ok(TokenIds(vec![7])));
        for wrong in ["", "1,,2", "-1", "1.5", "4294967296", "a", "1 2"] {
            assert!(wrong.parse::<TokenIds>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn ids_must_be_in_the_vocabulary() {
        assert!(check(&[0, 9], 10).is_ok());
        assert!(check(&[10], 10).unwrap_err().to_string().contains("vocabulary of 10"));
    }

    #[test]
    fn sequences_have_one_length() {
        assert_eq!(sequence_length(&[vec![1, 2], vec![3, 4]]).unwrap(), 2);
        let error = sequence_length(&[vec![1, 2], vec![3]]).unwrap_err().to_string();
        assert!(error.contains("the first has 2, number 2 has 1"), "{error}");
        assert!(sequence_length(&[]).is_err());
        assert!(sequence_length(&[vec![]]).is_err());
    }
}
