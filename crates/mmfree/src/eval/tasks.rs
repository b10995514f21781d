//! The tasks: a table of published files, prompts and metrics.
//!
//! | task | harness' name | evaluated split, file | examples |
//! |---|---|---|---|
//! | `arc-easy` | `arc_easy` | test, `ARC-Easy-Test.jsonl` | train |
//! | `arc-challenge` | `arc_challenge` | test, `ARC-Challenge-Test.jsonl` | train |
//! | `hellaswag` | `hellaswag` | validation, `hellaswag_val.jsonl` | train |
//! | `openbookqa` | `openbookqa` | test, `test.jsonl` | train |
//! | `piqa` | `piqa` | validation, `valid.jsonl`, `valid-labels.lst` | train |
//! | `winogrande` | `winogrande` | validation, `dev.jsonl` | train, `train_xl.jsonl` |
//! | `lambada` | `lambada_openai` | test, `lambada_test.jsonl` | test |

use std::path::{Path, PathBuf};

use super::files::{Row, read_labels, read_rows};
use super::python::{capitalize, strip};
use crate::error::{Error, Result};

/// Between a question and its answer.
const TARGET_DELIMITER: &str = " ";
/// Behind an example.
const SHOT_DELIMITER: &str = "\n\n";

/// A part of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// To learn from; examples come from here.
    Train,
    /// To choose by.
    Validation,
    /// To judge by.
    Test,
}

impl Split {
    /// `train`, `validation` or `test`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
            Self::Test => "test",
        }
    }
}

/// How a task is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The most likely of some answers.
    MultipleChoice {
        /// Whether accuracies by length-normalised likelihood are reported, too.
        normalised: bool,
    },
    /// Whether the last word is what the model would say, and its perplexity.
    LastWord,
}

/// A task.
#[derive(Debug)]
pub struct Task {
    /// What it is called here.
    pub name: &'static str,
    /// What lm-evaluation-harness calls it.
    pub harness_name: &'static str,
    /// How it is judged.
    pub kind: Kind,
    /// The split that the harness evaluates.
    pub split: Split,
    /// The split that examples come from.
    pub shots_from: Split,
    /// Whether the harness draws one example more, to leave the question out.
    pub(super) avoids_question: bool,
    /// Directories inside the user's in which the files may lie.
    directories: &'static [&'static str],
    /// Names of the files of a split.
    files: &'static [(Split, &'static [&'static str])],
    /// Where answers are that the lines do not say.
    labels: Option<Labels>,
    parse: fn(&Row) -> Result<Parsed>,
}

/// A list of labels beside a file of items, one a line: `valid-labels.lst` beside `valid.jsonl`.
#[derive(Debug)]
struct Labels {
    /// The field of an item that says the answer where there is no list.
    field: &'static str,
    /// The label of the first answer.
    first: usize,
    /// How many answers there are.
    answers: usize,
}

impl Labels {
    /// The answers to the items of a file; none if there is no list beside it.
    fn read(&self, path: &Path, items: usize) -> Result<Vec<usize>> {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let list = path.with_file_name(format!("{stem}-labels.lst"));
        if !list.is_file() {
            return Ok(Vec::new());
        }
        let labels = read_labels(&list, self.first, self.answers)?;
        if labels.len() != items {
            let what = format!("{} labels, but {} has {items} items", labels.len(), path.display());
            return Err(Error::Malformed { file: list.display().to_string(), what });
        }
        Ok(labels)
    }
}

/// Every task.
pub static TASKS: [Task; 7] = [
    Task {
        name: "arc-easy",
        harness_name: "arc_easy",
        kind: Kind::MultipleChoice { normalised: true },
        split: Split::Test,
        shots_from: Split::Train,
        avoids_question: false,
        directories: &[
            "ARC-Easy",
            "ARC-V1-Feb2018-2/ARC-Easy",
            "ARC-V1-Feb2018/ARC-Easy",
            "ai2_arc/ARC-Easy",
        ],
        files: &[
            (Split::Train, &["ARC-Easy-Train.jsonl"]),
            (Split::Validation, &["ARC-Easy-Dev.jsonl"]),
            (Split::Test, &["ARC-Easy-Test.jsonl"]),
        ],
        labels: None,
        parse: arc,
    },
    Task {
        name: "arc-challenge",
        harness_name: "arc_challenge",
        kind: Kind::MultipleChoice { normalised: true },
        split: Split::Test,
        shots_from: Split::Train,
        avoids_question: false,
        directories: &[
            "ARC-Challenge",
            "ARC-V1-Feb2018-2/ARC-Challenge",
            "ARC-V1-Feb2018/ARC-Challenge",
            "ai2_arc/ARC-Challenge",
        ],
        files: &[
            (Split::Train, &["ARC-Challenge-Train.jsonl"]),
            (Split::Validation, &["ARC-Challenge-Dev.jsonl"]),
            (Split::Test, &["ARC-Challenge-Test.jsonl"]),
        ],
        labels: None,
        parse: arc,
    },
    Task {
        name: "hellaswag",
        harness_name: "hellaswag",
        kind: Kind::MultipleChoice { normalised: true },
        split: Split::Validation,
        shots_from: Split::Train,
        avoids_question: true,
        directories: &["HellaSwag", "hellaswag/data"],
        files: &[
            (Split::Train, &["hellaswag_train.jsonl"]),
            (Split::Validation, &["hellaswag_val.jsonl"]),
            (Split::Test, &["hellaswag_test.jsonl"]),
        ],
        labels: None,
        parse: hellaswag,
    },
    Task {
        name: "openbookqa",
        harness_name: "openbookqa",
        kind: Kind::MultipleChoice { normalised: true },
        split: Split::Test,
        shots_from: Split::Train,
        avoids_question: false,
        directories: &[
            "OpenBookQA-V1-Sep2018/Data/Main",
            "openbookqa/Data/Main",
            "OpenBookQA/Data/Main",
            "Data/Main",
            "OpenBookQA",
            "obqa",
        ],
        files: &[
            (Split::Train, &["train.jsonl"]),
            (Split::Validation, &["dev.jsonl"]),
            (Split::Test, &["test.jsonl"]),
        ],
        labels: None,
        parse: open_book_qa,
    },
    Task {
        name: "piqa",
        harness_name: "piqa",
        kind: Kind::MultipleChoice { normalised: true },
        split: Split::Validation,
        shots_from: Split::Train,
        avoids_question: true,
        directories: &["PIQA", "piqa/data", "physicaliqa-train-dev"],
        files: &[
            (Split::Train, &["train.jsonl"]),
            (Split::Validation, &["valid.jsonl", "dev.jsonl"]),
            (Split::Test, &["tests.jsonl", "test.jsonl"]),
        ],
        labels: Some(Labels { field: "label", first: 0, answers: 2 }),
        parse: piqa,
    },
    Task {
        name: "winogrande",
        harness_name: "winogrande",
        kind: Kind::MultipleChoice { normalised: false },
        split: Split::Validation,
        shots_from: Split::Train,
        avoids_question: true,
        directories: &["winogrande_1.1", "winogrande_1.1/winogrande_1.1", "WinoGrande"],
        files: &[
            (Split::Train, &["train_xl.jsonl"]),
            (Split::Validation, &["dev.jsonl"]),
            (Split::Test, &["test.jsonl"]),
        ],
        labels: Some(Labels { field: "answer", first: 1, answers: 2 }),
        parse: winogrande,
    },
    Task {
        name: "lambada",
        harness_name: "lambada_openai",
        kind: Kind::LastWord,
        split: Split::Test,
        shots_from: Split::Test,
        avoids_question: false,
        directories: &["LAMBADA", "lambada_openai/data"],
        files: &[(Split::Test, &["lambada_test.jsonl", "lambada_test_en.jsonl"])],
        labels: None,
        parse: lambada,
    },
];

/// An item of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Doc {
    /// The line it came from.
    pub row: Row,
    /// What the data set calls it, or its line.
    pub id: String,
    /// What the model reads, one for all answers or one for each.
    pub contexts: Vec<String>,
    /// What is judged behind it, one for each answer or one for all.
    pub continuations: Vec<String>,
    /// Answers, whose lengths normalise likelihoods. One if there is nothing to choose.
    pub choices: Vec<String>,
    /// The right answer.
    pub gold: usize,
    /// The item as an example, with what separates it from what follows.
    pub example: String,
}

impl Doc {
    /// Context and continuation of every answer.
    pub fn requests(&self) -> impl Iterator<Item = (&str, &str)> {
        (0..self.contexts.len().max(self.continuations.len())).map(|answer| {
            let of = |texts: &'_ [String]| if texts.len() == 1 { 0 } else { answer };
            let context = &self.contexts[of(&self.contexts)];
            (context.as_str(), self.continuations[of(&self.continuations)].as_str())
        })
    }
}

/// What a line says.
struct Parsed {
    id: Option<String>,
    contexts: Vec<String>,
    continuations: Vec<String>,
    choices: Vec<String>,
    gold: Option<usize>,
    /// Question and answer of the item as an example, for each gold.
    example: fn(&Parsed, usize) -> [&str; 2],
}

impl Task {
    /// A task by its name or the harness'.
    ///
    /// # Errors
    /// No task is called so; the error lists all.
    pub fn find(name: &str) -> Result<&'static Self> {
        let name = name.trim();
        let found = TASKS.iter().find(|task| {
            task.name.eq_ignore_ascii_case(&name.replace('_', "-")) || task.harness_name == name
        });
        found.ok_or_else(|| {
            let names: Vec<_> = TASKS.iter().map(|task| task.name).collect();
            Error::Invalid(format!("there is no task {name:?}; tasks: {}", names.join(", ")))
        })
    }

    /// Finds the file of a split in a directory: under a directory of the task's name or of its published
    /// archive's, or in the directory itself.
    ///
    /// # Errors
    /// There is none; the error names the file.
    pub fn locate(&self, data: &Path, split: Split) -> Result<PathBuf> {
        if !data.is_dir() {
            let reason =
                if data.exists() { "it is no directory" } else { "there is no such directory" };
            let reason = std::io::Error::other(reason);
            return Err(Error::Read { file: data.display().to_string(), reason });
        }
        let names = self.files.iter().find(|files| files.0 == split).map_or(&[][..], |f| f.1);
        if names.is_empty() {
            let what = format!("{} has no {} split", self.name, split.name());
            return Err(Error::Invalid(what));
        }
        let own = [self.name, self.harness_name];
        let directories = own.iter().chain(self.directories).chain(&[""]);
        for directory in directories {
            for name in names {
                let path = data.join(directory).join(name);
                if path.is_file() {
                    return Ok(path);
                }
            }
        }
        Err(Error::Read {
            file: data.join(self.name).join(names[0]).display().to_string(),
            reason: std::io::Error::other(format!(
                "there is no {} split of {} there (looked for {} in {}, {} and the directory itself)",
                split.name(),
                self.name,
                names.join(" or "),
                own.join(", "),
                self.directories.join(", "),
            )),
        })
    }

    /// Reads the items of a file.
    ///
    /// # Errors
    /// Errors of reading; anything malformed, with file, line and field.
    pub fn read(&self, path: &Path) -> Result<Vec<Doc>> {
        let rows = read_rows(path)?;
        let labels = match &self.labels {
            Some(labels) => labels.read(path, rows.len())?,
            None => Vec::new(),
        };
        let docs = rows.into_iter().enumerate();
        docs.map(|(index, row)| self.doc(row, labels.get(index).copied())).collect()
    }

    /// Makes an item of a line; `label` is the right answer where the line does not say it.
    ///
    /// # Errors
    /// Fields that are missing or not what they should be.
    pub fn doc(&self, row: Row, label: Option<usize>) -> Result<Doc> {
        let parsed = (self.parse)(&row)?;
        let gold = parsed.gold.or(label).ok_or_else(|| {
            let field = self.labels.as_ref().map_or("label", |labels| labels.field);
            row.error(field, "it is missing, and there is no list of labels beside the file")
        })?;
        let [question, answer] = (parsed.example)(&parsed, gold);
        let example = match answer {
            "" => question.to_owned(),
            answer => [question, TARGET_DELIMITER, answer, SHOT_DELIMITER].concat(),
        };
        let Parsed { id, contexts, continuations, choices, .. } = parsed;
        let id = id.unwrap_or_else(|| row.line.to_string());
        Ok(Doc { id, contexts, continuations, choices, gold, example, row })
    }
}

/// A question with answers behind it.
fn multiple_choice(
    id: Option<String>,
    context: String,
    choices: Vec<String>,
    gold: Option<usize>,
) -> Parsed {
    let continuations = choices.iter().map(|choice| [TARGET_DELIMITER, choice].concat()).collect();
    let example = after_question;
    Parsed { id, contexts: vec![context], continuations, choices, gold, example }
}

// Question and answer of an item as an example.

fn after_question(parsed: &Parsed, gold: usize) -> [&str; 2] {
    [&parsed.contexts[0], &parsed.choices[gold]]
}

fn after_option(parsed: &Parsed, gold: usize) -> [&str; 2] {
    [&parsed.contexts[gold], &parsed.continuations[0][TARGET_DELIMITER.len()..]]
}

fn last_word(parsed: &Parsed, _: usize) -> [&str; 2] {
    [&parsed.contexts[0], &parsed.continuations[0]]
}

fn id(row: &Row, field: &str) -> Option<String> {
    row.find(field).map(|id| id.as_str().map_or_else(|| id.to_string(), str::to_owned))
}

/// Texts and labels of answers: a list of objects as AI2 published it, or an object of lists as the hub has it.
fn labelled_choices(row: &Row, field: &str) -> Result<(Vec<String>, Vec<String>)> {
    if row.find(field).is_some_and(serde_json::Value::is_object) {
        let (texts, labels) =
            (row.texts(&format!("{field}.text"))?, row.texts(&format!("{field}.label"))?);
        if texts.len() != labels.len() {
            return Err(row.error(field, "there are not as many labels as texts"));
        }
        return Ok((texts, labels));
    }
    let (mut texts, mut labels) = (Vec::new(), Vec::new());
    for (index, choice) in row.list(field)?.iter().enumerate() {
        for (name, into) in [("text", &mut texts), ("label", &mut labels)] {
            let text = choice.get(name).and_then(serde_json::Value::as_str);
            let text = text.ok_or_else(|| {
                row.error(&format!("{field}[{index}].{name}"), "expected a string")
            })?;
            into.push(text.to_owned());
        }
    }
    Ok((texts, labels))
}

/// The answer that a label means.
fn labelled_gold(row: &Row, key: &str, labels: &[String]) -> Result<usize> {
    labels.iter().position(|label| label == key).ok_or_else(|| {
        let what = format!("{key:?} is none of the labels {}", labels.join(", "));
        row.error("answerKey", &what)
    })
}

fn check_choices(row: &Row, field: &str, choices: &[String]) -> Result<()> {
    if choices.is_empty() {
        return Err(row.error(field, "there are no answers"));
    }
    match choices.iter().position(String::is_empty) {
        Some(index) => Err(row.error(&format!("{field}[{index}]"), "the answer is empty")),
        None => Ok(()),
    }
}

/// A question of AI2: where its text and answers are.
fn ai2_question(row: &Row, flat: &str) -> Result<(String, Vec<String>, Vec<String>)> {
    let is_flat = row.find(flat).is_some_and(serde_json::Value::is_string);
    let (stem, field) = match is_flat {
        true => (flat, "choices"),
        false => ("question.stem", "question.choices"),
    };
    let (choices, labels) = labelled_choices(row, field)?;
    check_choices(row, field, &choices)?;
    Ok((row.text(stem)?.to_owned(), choices, labels))
}

fn arc(row: &Row) -> Result<Parsed> {
    let (question, choices, labels) = ai2_question(row, "question")?;
    let gold = labelled_gold(row, row.text("answerKey")?, &labels)?;
    let context = format!("Question: {question}\nAnswer:");
    Ok(multiple_choice(id(row, "id"), context, choices, Some(gold)))
}

fn open_book_qa(row: &Row) -> Result<Parsed> {
    let (question, choices, labels) = ai2_question(row, "question_stem")?;
    let gold = labelled_gold(row, row.text("answerKey")?.trim_start(), &labels)?;
    Ok(multiple_choice(id(row, "id"), question, choices, Some(gold)))
}

/// Takes the artefacts of WikiHow out of HellaSwag's texts.
fn clean_up(text: &str) -> String {
    let text = strip(text).replace(" [title]", ". ");
    let mut rest = text.as_str();
    let mut cleaned = String::with_capacity(rest.len());
    // The shortest [...] within a line.
    while let Some(open) = rest.find('[') {
        let inside = &rest[open + 1..];
        let close = inside.find(']').filter(|&close| !inside[..close].contains('\n'));
        match close {
            Some(close) => {
                cleaned.push_str(&rest[..open]);
                rest = &inside[close + 1..];
            }
            None => {
                cleaned.push_str(&rest[..=open]);
                rest = inside;
            }
        }
    }
    cleaned.push_str(rest);
    cleaned.replace("  ", " ")
}

fn hellaswag(row: &Row) -> Result<Parsed> {
    let context = [row.text("ctx_a")?, " ", &capitalize(row.text("ctx_b")?)].concat();
    let context = clean_up(&format!("{}: {context}", row.text("activity_label")?));
    let choices: Vec<_> = row.texts("endings")?.iter().map(|ending| clean_up(ending)).collect();
    check_choices(row, "endings", &choices)?;
    let gold = row.index("label", choices.len())?;
    Ok(multiple_choice(id(row, "ind"), context, choices, Some(gold)))
}

fn piqa(row: &Row) -> Result<Parsed> {
    let choices = vec![row.text("sol1")?.to_owned(), row.text("sol2")?.to_owned()];
    for (field, choice) in ["sol1", "sol2"].iter().zip(&choices) {
        if choice.is_empty() {
            return Err(row.error(field, "the answer is empty"));
        }
    }
    let gold = row.find("label").map(|_| row.index("label", 2)).transpose()?;
    let context = format!("Question: {}\nAnswer:", row.text("goal")?);
    Ok(multiple_choice(id(row, "id"), context, choices, gold))
}

/// The sentence up to and with each option is what the model reads; what follows is judged.
fn winogrande(row: &Row) -> Result<Parsed> {
    let sentence = row.text("sentence")?;
    let (before, after) = sentence
        .split_once('_')
        .ok_or_else(|| row.error("sentence", "there is no blank \"_\" in it"))?;
    let choices = ["option1", "option2"]
        .map(|option| Ok([before, row.text(option)?].concat()))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let gold = match row.find("answer").and_then(serde_json::Value::as_str) {
        None if row.find("answer").is_none() => None,
        Some("") => None,
        Some("1") => Some(0),
        Some("2") => Some(1),
        _ => return Err(row.error("answer", "expected \"1\" or \"2\"")),
    };
    let continuation = [TARGET_DELIMITER, strip(after)].concat();
    let example = after_option;
    let contexts = choices.clone();
    Ok(Parsed {
        id: id(row, "qID"),
        contexts,
        continuations: vec![continuation],
        choices,
        gold,
        example,
    })
}

/// The last word, cut off at the last space.
fn lambada(row: &Row) -> Result<Parsed> {
    let text = row.text("text")?;
    let (context, word) = text.rsplit_once(' ').unwrap_or(("", text));
    if word.is_empty() {
        return Err(row.error("text", "it ends with a space or is empty, so there is no last word"));
    }
    let word = [" ", word].concat();
    let example = last_word;
    let (contexts, continuations) = (vec![context.to_owned()], vec![word.clone()]);
    Ok(Parsed { id: None, contexts, continuations, choices: vec![word], gold: Some(0), example })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hellaswag_is_cleaned_up() {
        assert_eq!(clean_up(" a [header] b [title] c"), "a b. c");
        assert_eq!(clean_up("[x]  [y\n] [z"), " [y\n] [z");
        assert_eq!(clean_up("a [b [c] d]"), "a  d]".replace("  ", " "));
    }

    #[test]
    fn tasks_are_found_by_either_name() {
        assert_eq!(Task::find("arc_easy").unwrap().name, "arc-easy");
        assert_eq!(Task::find("lambada_openai").unwrap().name, "lambada");
        assert_eq!(Task::find("HellaSwag").unwrap().name, "hellaswag");
        let error = Task::find("mmlu").unwrap_err().to_string();
        assert!(TASKS.iter().all(|task| error.contains(task.name)), "{error}");
    }
}
