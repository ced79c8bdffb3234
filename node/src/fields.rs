//! The fields of a request, whoever read them: decisions take them in any form. Pure.

use std::borrow::Cow;

use http::header::{HeaderMap, HeaderName, HeaderValue};

/// The fields of a request, whoever read them.
pub trait Fields {
    /// The values of all lines of a field, in their order.
    fn lines<'a>(&'a self, name: &'a HeaderName) -> impl Iterator<Item = &'a [u8]>;

    /// All of them.
    fn to_map(&self) -> Cow<'_, HeaderMap>;

    /// Whether there is such a field.
    fn has(&self, name: &HeaderName) -> bool {
        self.lines(name).next().is_some()
    }
}

impl Fields for HeaderMap {
    fn lines<'a>(&'a self, name: &'a HeaderName) -> impl Iterator<Item = &'a [u8]> {
        self.get_all(name).iter().map(HeaderValue::as_bytes)
    }

    fn to_map(&self) -> Cow<'_, HeaderMap> {
        Cow::Borrowed(self)
    }
}

/// A field's value, if it is text: ASCII that can be seen, blanks and tabs.
pub fn text(value: &[u8]) -> Option<&str> {
    let is_text = |byte: &u8| matches!(byte, b'\t' | b' '..=b'~');
    let value = value.iter().all(is_text).then_some(value)?;
    std::str::from_utf8(value).ok()
}

/// A map of fields, names and values; what is not a valid field is left out.
pub fn map_of<'a>(fields: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>) -> HeaderMap {
    let mut map = HeaderMap::with_capacity(fields.len());
    for (name, value) in fields {
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(name), HeaderValue::from_bytes(value))
        {
            map.append(name, value);
        }
    }
    map
}
