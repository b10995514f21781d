//! Values of configuration keys: from TOML, to TOML, with what was expected when they do not fit.

use std::borrow::Cow;

use toml::de::DeValue;

/// A type that a key can have.
pub(super) trait Setting: Sized {
    /// Reads a value.
    ///
    /// # Errors
    /// What was expected.
    fn read(value: &DeValue) -> Result<Self, Cow<'static, str>>;

    /// The value as TOML.
    fn show(&self) -> String;
}

impl Setting for usize {
    fn read(value: &DeValue) -> Result<Self, Cow<'static, str>> {
        let expected = "a whole number of at least 0";
        let DeValue::Integer(number) = value else { return Err(expected.into()) };
        Self::from_str_radix(number.as_str(), number.radix()).map_err(|_| expected.into())
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Setting for u64 {
    fn read(value: &DeValue) -> Result<Self, Cow<'static, str>> {
        usize::read(value).map(|number| number as Self)
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Setting for f64 {
    fn read(value: &DeValue) -> Result<Self, Cow<'static, str>> {
        let text = match value {
            DeValue::Float(number) => number.as_str(),
            DeValue::Integer(number) if number.radix() == 10 => number.as_str(),
            _ => return Err("a number".into()),
        };
        match text.parse() {
            Ok(number) if Self::is_finite(number) => Ok(number),
            _ => Err("a finite number".into()),
        }
    }

    fn show(&self) -> String {
        if *self != 0.0 && !(1e-3..1e7).contains(&self.abs()) {
            format!("{self:e}")
        } else {
            format!("{self:?}")
        }
    }
}

impl Setting for bool {
    fn read(value: &DeValue) -> Result<Self, Cow<'static, str>> {
        value.as_bool().ok_or("true or false".into())
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Setting for String {
    fn read(value: &DeValue) -> Result<Self, Cow<'static, str>> {
        value.as_str().map(str::to_owned).ok_or("a text in quotes".into())
    }

    fn show(&self) -> String {
        quoted(self)
    }
}

impl Setting for Vec<String> {
    fn read(value: &DeValue) -> Result<Self, Cow<'static, str>> {
        let expected = "a list of texts in quotes";
        match value {
            DeValue::String(one) => Ok(vec![one.to_string()]),
            DeValue::Array(items) => items
                .iter()
                .map(|item| item.get_ref().as_str().map(str::to_owned))
                .collect::<Option<_>>()
                .ok_or(expected.into()),
            _ => Err(expected.into()),
        }
    }

    fn show(&self) -> String {
        let items: Vec<_> = self.iter().map(|item| quoted(item)).collect();
        format!("[{}]", items.join(", "))
    }
}

/// A TOML basic string: its escapes are those of JSON, but for DEL.
pub(super) fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string().replace('\x7f', "\\u007F")
}

/// Implements [`Setting`] for an enum of plain choices.
macro_rules! choices {
    ($type:ty { $($variant:ident = $name:literal),+ $(,)? }) => {
        impl $crate::config::value::Setting for $type {
            fn read(value: &toml::de::DeValue) -> std::result::Result<Self, std::borrow::Cow<'static, str>> {
                match value.as_str() {
                    $(Some($name) => Ok(Self::$variant),)+
                    _ => Err([$(concat!("\"", $name, "\"")),+].join(" or ").into()),
                }
            }

            fn show(&self) -> String {
                match self { $(Self::$variant => concat!("\"", $name, "\"").to_owned()),+ }
            }
        }
    };
}
pub(super) use choices;
