//! Dictionaries of RFC 8941 (structured fields), as RFC 9213 needs them.

use super::Directives;

/// Reads a dictionary; `None` when it is not one. Parameters are checked
/// and dropped, a false boolean is as if it were absent, and of a key given
/// twice the last counts. A value that is no integer keeps its text, which
/// no caller takes for a number.
pub fn dictionary(text: &str) -> Option<Directives> {
    let mut reader = Reader(text.trim_matches(' '));
    let mut list: Vec<(String, Option<String>)> = Vec::new();
    while !reader.0.is_empty() {
        let key = reader.key()?;
        let value = if reader.take('=') {
            reader.member()?
        } else {
            Value::True
        };
        reader.parameters()?;
        list.retain(|(name, _)| *name != key);
        match value {
            Value::True => list.push((key, None)),
            Value::False => {}
            Value::Other(text) => list.push((key, Some(text))),
        }
        reader.white_space();
        if reader.0.is_empty() {
            break;
        }
        if !reader.take(',') {
            return None;
        }
        reader.white_space();
        if reader.0.is_empty() {
            return None;
        }
    }
    Some(Directives(list))
}

enum Value {
    True,
    False,
    Other(String),
}

struct Reader<'a>(&'a str);

impl<'a> Reader<'a> {
    fn take(&mut self, c: char) -> bool {
        match self.0.strip_prefix(c) {
            Some(rest) => {
                self.0 = rest;
                true
            }
            None => false,
        }
    }

    fn white_space(&mut self) {
        self.0 = self.0.trim_start_matches([' ', '\t']);
    }

    /// The longest run of characters that `is` accepts.
    fn run(&mut self, is: impl Fn(char) -> bool) -> &'a str {
        let end = self.0.find(|c| !is(c)).unwrap_or(self.0.len());
        let (run, rest) = self.0.split_at(end);
        self.0 = rest;
        run
    }

    fn key(&mut self) -> Option<String> {
        let key = self.run(|c| {
            c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '-' | '.' | '*')
        });
        key.starts_with(|c: char| c.is_ascii_lowercase() || c == '*')
            .then(|| key.to_owned())
    }

    fn member(&mut self) -> Option<Value> {
        if !self.take('(') {
            return self.item();
        }
        loop {
            self.0 = self.0.trim_start_matches(' ');
            if self.take(')') {
                return Some(Value::Other("(".into()));
            }
            self.item()?;
            self.parameters()?;
            if !self.0.starts_with([' ', ')']) {
                return None;
            }
        }
    }

    fn item(&mut self) -> Option<Value> {
        match self.0.chars().next()? {
            '?' => {
                self.take('?');
                match (self.take('1'), self.take('0')) {
                    (true, _) => Some(Value::True),
                    (false, true) => Some(Value::False),
                    (false, false) => None,
                }
            }
            '"' => {
                self.take('"');
                // Kept with its quote: a string is not a number.
                let mut text = String::from("\"");
                loop {
                    let c = self.0.chars().next()?;
                    self.take(c);
                    match c {
                        '"' => return Some(Value::Other(text)),
                        '\\' => {
                            let escaped = self.0.chars().next()?;
                            if !matches!(escaped, '"' | '\\') {
                                return None;
                            }
                            self.take(escaped);
                            text.push(escaped);
                        }
                        ' '..='~' => text.push(c),
                        _ => return None,
                    }
                }
            }
            ':' => {
                self.take(':');
                self.run(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '/' | '='));
                self.take(':').then(|| Value::Other(":".into()))
            }
            '-' | '0'..='9' => {
                let negative = self.take('-');
                let whole = self.run(|c| c.is_ascii_digit());
                let mut text = format!("{}{whole}", if negative { "-" } else { "" });
                let fraction_follows = self.take('.');
                if fraction_follows {
                    let fraction = self.run(|c| c.is_ascii_digit());
                    text = format!("{text}.{fraction}");
                    if !(1..=3).contains(&fraction.len()) {
                        return None;
                    }
                }
                let digits_max = if fraction_follows { 12 } else { 15 };
                (1..=digits_max)
                    .contains(&whole.len())
                    .then_some(Value::Other(text))
            }
            c if c.is_ascii_alphabetic() || c == '*' => {
                let token =
                    self.run(|c| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~:/".contains(c));
                Some(Value::Other(token.to_owned()))
            }
            _ => None,
        }
    }

    fn parameters(&mut self) -> Option<()> {
        while self.take(';') {
            self.0 = self.0.trim_start_matches(' ');
            self.key()?;
            if self.take('=') {
                self.item()?;
            }
        }
        Some(())
    }
}
